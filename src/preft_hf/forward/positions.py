"""Where the prompt of one generation ends, and the position of each of its forwards: counted, not read off a cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preft_core.rule.tokens import prefill_span
from preft_hf.forward.cache_record import record_of
from preft_hf.forward.caches import cache_of, cached_length
from preft_hf.forward.routing import RowAdapters


@dataclass
class Generation:
    """One call of generate. Positions count every slot of a row, padding included, from the start of its cache.

    Attributes:
        prompt_length: tokens of the prompt, which are prefill
        num_seen: tokens that the request has had so far: those in its cache at the start, plus those of each forward
        first_id: position of the first of generate's token ids, above 0 where they continue a cache without its tokens
        starts: for each prompt, the position of its first token that is prefill, above 0 where the tokens before were
            generated into the cache that it continues
        drafting: True for the generate by which an assisted generation has this same model draft its tokens
        adapters: one adapter per prompt, or None where the active ones act on all
    """

    prompt_length: int
    num_seen: int
    first_id: int
    starts: list[int]
    drafting: bool
    adapters: RowAdapters | None

    def prefill(self, first: int, num_rows: int, num_tokens: int, device: torch.device) -> Tensor | bool:
        """Returns which tokens of a forward are prefill: True for all, False for none, else a bool (rows, tokens).

        Args:
            first: position of the forward's first token
            num_rows: rows of the forward, several per prompt with beams and returned sequences
        """
        spans = [prefill_span(first, num_tokens, self.prompt_length, start) for start in self.starts]
        if all(begin == end for begin, end in spans):
            return False
        if all(span == (0, num_tokens) for span in spans):
            return True
        rows = torch.tensor(spans[:1] if len(set(spans)) == 1 else spans, device=device)
        begins, ends = rows.repeat_interleave(num_rows // len(rows), 0).T[:, :, None]
        token = torch.arange(num_tokens, device=device)
        return (token >= begins) & (token < ends)


@dataclass(frozen=True)
class WholePrefill:
    """The prefill_mask of one forward whose tokens are all prefill. A bool would fit a later forward just as well.

    Attributes:
        first: position of the forward's first token
        num_tokens: tokens of a row
        cached: length of the forward's cache, None where it has none
    """

    first: int
    num_tokens: int
    cached: int | None

    def check(self, cached: int | None, num_tokens: int) -> None:
        """Raises a RuntimeError for another forward: one of other tokens, or whose cache has changed since."""
        if (cached, num_tokens) == (self.cached, self.num_tokens):
            return
        raise RuntimeError(
            f"prefill_mask is from the prepare_inputs_for_generation of a forward of {self.num_tokens} tokens from "
            f"position {self.first} on, all of the prompt, and this one has {num_tokens} tokens"
            + ("" if cached is None else f" after {cached} in the cache")
            + ": in a custom loop call prepare_inputs_for_generation before every forward, or set prefill_mask"
        )


def generation_of(
    cache: Any, ids: Tensor | None, kwargs: Mapping[str, Any], adapters: RowAdapters | None
) -> Generation:
    """Returns the state of a generation from its arguments, as transformers reads them.

    `inputs_embeds` always holds the whole prompt. Token ids hold only the new tokens if the attention mask is longer
    than they are, else the whole prompt. Neither means a prompt of one BOS token.
    """
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    num_ids = ids.shape[1] if ids is not None else int(embeds is None)
    num_masked = mask.shape[1] if embeds is None and mask is not None and mask.shape[1] != num_ids else None
    held, record = cached_length(cache) or 0, record_of(cache)
    seen = held if record is None else record.position(held, num_ids, num_masked)
    num_given = num_ids if embeds is None else embeds.shape[1]
    prompt_length = num_given if num_masked is None else seen + num_ids
    first_id = prompt_length - num_ids
    rows = next((len(x) for x in (ids, embeds) if x is not None), 1)
    new_ids = None if ids is None or num_ids == 0 else ids[:, seen - first_id :]
    starts = [0] * rows if record is None else record.starts(seen, new_ids, rows)
    return Generation(prompt_length, seen, first_id, starts, False, adapters)


def first_position(model_inputs: Mapping[str, Any], num_ids: int, num_tokens: int, generation: Generation) -> int:
    """Returns the position of a forward's first token.

    Two counts must agree: the tokens that the request has had, and the place of the forward's tokens among the ids.
    The cache's length decides only where they do not, as after rejected candidates: it may evict or compress, so what
    it holds is not what the request has had.

    Args:
        num_ids: token ids that prepare_inputs_for_generation was given; the forward's tokens are the last of them
        num_tokens: tokens of the forward
    Raises:
        RuntimeError: the forward has no cache, and not the prompt and more tokens than the forward before: its cache
            must be one that is not known here. Or counts and cache disagree.
    """
    cache = cache_of(model_inputs)
    if cache is None:
        if num_tokens < generation.prompt_length or num_tokens <= generation.num_seen:
            raise RuntimeError(
                f"generate called the model with {num_tokens} tokens, for a prompt of {generation.prompt_length}, and "
                f"none of its arguments ({', '.join(model_inputs)}) is a cache that preft-hf knows, so nothing tells "
                f"prompt tokens from generated ones: `preft doctor` says which transformers fits"
            )
        # without a cache every forward starts from the prompt's first token
        return 0
    counted, by_ids = generation.num_seen, generation.first_id + num_ids - num_tokens
    if counted == by_ids:
        return counted
    if num_ids == num_tokens and counted + num_tokens <= generation.prompt_length:
        # a chunk of the prompt comes without the ids before it
        return counted
    length = cached_length(cache)
    # A forward across the prompt's end is given ids up to its own end, so there the ids are right.
    crosses = counted < generation.prompt_length < counted + num_tokens
    if length == by_ids:
        return by_ids
    if length == counted and not crosses:
        return counted
    raise RuntimeError(
        f"the position of a forward's {num_tokens} tokens is {counted} as counted, {by_ids} by the ids given to "
        f"prepare_inputs_for_generation, and the cache holds {length} tokens, so nothing tells prompt tokens from "
        "generated ones: with assisted decoding and in custom loops use a cache that keeps every token, and to "
        "continue one give only the new ids, with an attention_mask over the whole request"
    )
