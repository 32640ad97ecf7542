"""What a KV cache remembers of its request: whose prompt it holds, and what the model generated into it.

A record is an attribute of the cache, so it is copied and dropped with it. `reset`, `crop` and eviction show in the
cache's length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from preft_hf.forward.caches import cached_length

ATTRIBUTE = "_preft_record"

Owners = tuple[bytes | None, ...]
"""The key of the adapter of each row's prompt, None for the base model."""


class Answer(NamedTuple):
    """Generated tokens, int64 (rows, tokens), and the position of the first of them."""

    begin: int
    tokens: Tensor


@dataclass(frozen=True)
class CacheRecord:
    """What is known of a cache beyond its tensors.

    Attributes:
        owners: whose keys and values the prompt's are
        length: the cache's own length when the record was made, 0 if it does not count
        num_seen: tokens that the request has had, those evicted from the cache included; None after a custom loop
        prompt_row: (rows, features), keys of the prompt's last token, by which rows of several owners are known again
            after rows were selected, repeated or reordered; None for one owner, and where the keys cannot be read
        prompt_end: index of that token in the cache
        answers: what generate has returned, in the order of positions, as far as it is known. The last token of each
            was not fed to the model by the generate that sampled it
    """

    owners: Owners
    length: int
    num_seen: int | None = None
    prompt_row: Tensor | None = None
    prompt_end: int = 0
    answers: tuple[Answer, ...] = ()

    def position(self, held: int, num_ids: int, num_masked: int | None) -> int:
        """Returns the position of the first token that continues the cache.

        Args:
            held: the cache's length now
            num_ids: token ids given, of which the new ones are the last
            num_masked: columns of the attention mask if only the new ids were given, else None
        Raises:
            ValueError: the cache holds fewer tokens than the request has had, so transformers, which goes by the
                cache's length, would feed some of the ids twice.
        """
        if num_masked is not None:
            masked = num_masked - num_ids
            if self.num_seen is not None and (self.length == held or masked == self.num_seen):
                return self.num_seen
            return max(masked, held)
        if self.num_seen in (None, self.length):
            return held
        raise ValueError(
            f"the cache holds {held} tokens of a request that has had {self.num_seen}, and generate was given ids for "
            "all of them: transformers would feed some twice; give only the new ids, with an attention_mask over the "
            "whole request, or leave the cache out"
        )

    def starts(self, first: int, new_ids: Tensor | None, num_rows: int) -> list[int]:
        """Returns for each row the position after the tokens of an answer that are fed now; 0 if none of them is.

        Args:
            first: position of the first token that is fed
            new_ids: int64, (rows, tokens), the tokens from there on; None if only their embeddings are known
        """
        # an earlier answer, where the cache was cropped to an earlier turn
        found = [a for a in self.answers if a.begin <= first < a.begin + a.tokens.shape[1]]
        if not found:
            return [0] * num_rows
        answer = found[-1].tokens[:, first - found[-1].begin :]
        if new_ids is None:
            return [first + answer.shape[1]] * num_rows
        width = min(answer.shape[1], new_ids.shape[1])
        answer, new_ids = answer[:, :width].to(new_ids.device), new_ids[:, :width]
        counts = (new_ids[:, None] == answer[None]).cumprod(-1).sum(-1)
        if len(answer) == num_rows:
            # a row's own answer counts first; rows that were reordered since may be any of the answers'
            own = counts.diagonal()
            counts = torch.where(own > 0, own, counts.amax(-1))
        else:
            counts = counts.amax(-1)
        counts = counts.tolist()
        return [first + count if count else 0 for count in counts]


def record_of(cache: Any) -> CacheRecord | None:
    """Returns the record of a cache, None if it has none."""
    return getattr(cache, ATTRIBUTE, None)


def drop_if_emptied(cache: Any) -> None:
    """Removes the record of a cache that was emptied since. Must run before the forward that fills it again."""
    record = record_of(cache)
    if record is not None and record.length > 0 and cached_length(cache) == 0:
        delattr(cache, ATTRIBUTE)


def record_owners(cache: Any, owners: Owners) -> None:
    """Records, after a forward of prompt tokens, whose they are.

    Args:
        owners: of the forward's rows; `check_owners` has found that the cache holds nobody else's prompts
    """
    length = cached_length(cache) or 0
    row = _keys_at(cache, length - 1) if len(set(owners)) > 1 else None
    before = record_of(cache)
    answers = () if before is None else before.answers
    _put(cache, CacheRecord(owners, length, prompt_row=row, prompt_end=length - 1, answers=answers))


def record_generated(cache: Any, output: Any, first_id: int, prompt_length: int, num_seen: int) -> None:
    """Records what a generation has left in a cache.

    Args:
        output: what generate returns: token ids, or an output that has them as `sequences`
        first_id: position of the first of these ids
        num_seen: tokens that the request has had, rejected candidates included
    """
    record, length = record_of(cache) or CacheRecord((None,), 0), cached_length(cache) or 0
    ids = output.get("sequences") if isinstance(output, Mapping) else output
    earlier = tuple(answer for answer in record.answers if answer.begin < prompt_length)
    # the last token was not fed; rejected candidates were, and have been cropped
    num_fed = first_id + ids.shape[1] - 1 if isinstance(ids, Tensor) else None
    if num_fed in (num_seen, length):
        assert isinstance(ids, Tensor)
        answers = (*earlier, Answer(prompt_length, ids[:, prompt_length - first_id :].clone()))
        _put(cache, replace(record, length=length, num_seen=num_fed, answers=answers))
    else:
        _put(cache, replace(record, length=length, num_seen=num_seen, answers=earlier))


def check_owners(cache: Any, owners: Owners | None) -> None:
    """Raises a ValueError if a cache holds the prompt of another adapter than that of a request that continues it.

    Args:
        owners: of the rows of the request; None if all are the base model's
    """
    record = record_of(cache)
    if record is None or set(record.owners) == {None}:
        return
    before = _owners_now(record, cache, None if owners is None else len(owners))
    if before is None:
        raise ValueError(
            f"the cache holds {len(record.owners)} rows of several adapters, of which rows were changed or removed "
            "since, so nothing tells which row belongs to which adapter: use one cache per adapter, or generate "
            "without past_key_values"
        )
    owners = (None,) * len(before) if owners is None else owners
    faults = [i for i, (old, new) in enumerate(zip(before, owners, strict=True)) if old not in (None, new)]
    if faults:
        raise ValueError(
            f"rows {faults[:8]} of the cache hold keys and values of a prompt that another adapter has read, or this "
            "one before its weights changed: a cache belongs to one adapter; leave past_key_values out to read the "
            "whole conversation with this adapter"
        )


def _owners_now(record: CacheRecord, cache: Any, num_rows: int | None) -> Owners | None:
    """Returns the owner of each row that the cache has now; None if that cannot be told."""
    if len(set(record.owners)) == 1:
        return record.owners[:1] * (num_rows or 1)
    if record.prompt_row is None and record.num_seen is None and len(record.owners) == num_rows:
        # the next chunk of a prompt: rows keep their order within a generation
        return record.owners
    now = _keys_at(cache, record.prompt_end)
    if record.prompt_row is None or now is None or (num_rows is not None and len(now) != num_rows):
        return None
    same = (now[:, None] == record.prompt_row[None].to(now.device)).all(-1).tolist()
    found = [{owner for owner, is_same in zip(record.owners, row, strict=True) if is_same} for row in same]
    # rows with the same keys and other owners cannot be told apart
    return tuple(owners.pop() for owners in found) if all(len(owners) == 1 for owners in found) else None


def _keys_at(cache: Any, index: int) -> Tensor | None:
    """Returns the keys at one index of the last layer that keeps all of them: (rows, features), a copy."""
    for layer in reversed(getattr(cache, "layers", None) or []):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and not getattr(layer, "is_sliding", False):
            return keys[:, :, index].flatten(1).clone() if 0 <= index < keys.shape[2] else None
    return None


def _put(cache: Any, record: CacheRecord) -> None:
    try:
        setattr(cache, ATTRIBUTE, record)
    except AttributeError:
        # a list, as RWKV's
        return
