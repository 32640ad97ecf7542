"""The prefix cache in TGI's batches: prompts are looked up when a request arrives and kept when prefill ends."""

from collections.abc import Sequence
from typing import Any

import torch

from tgi_patch.server.prefixes import OWNER, Found, PrefixCache, num_blocks


class PrefixReuse:
    """Looks up and keeps the prompts of a model's requests.

    Args:
        cache: blocks of the store
        model: TGI's, whose `kv_cache` holds the requests' blocks
    """

    def __init__(self, cache: PrefixCache, model: Any):
        self.cache = cache
        self._model = model

    def find(self, requests: Sequence[Any], owners: Sequence[str], inputs: Sequence[Sequence[int]]) -> list[Found]:
        """Looks up the prefixes of prompts and sets the requests' `cache_len`, so that TGI does not compute them.

        A request for the prompt's log-probabilities computes all of it, as does one without blocks (warm-up).

        Args:
            owners: of each request's KV
            inputs: the token ids of each request
        """
        everything = []
        for request, owner, tokens in zip(requests, owners, inputs, strict=True):
            found = Found()
            if request.blocks and not request.prefill_logprobs:
                found = self.cache.find(owner, tokens)
                request.cache_len = found.num_tokens
                if request.HasField("chunk_len"):
                    request.chunk_len = min(request.chunk_len, len(tokens) - found.num_tokens)
            everything.append(found)
        return everything

    def fill(self, batch: Any, found: Sequence[Found]) -> None:
        """Copies cached prefixes into the blocks of a batch's requests."""
        for prefix, blocks in zip(found, batch.block_tables, strict=True):
            self.cache.fill(prefix, self._model.kv_cache, blocks)

    def keep(self, batch: Any, before: Sequence[bool]) -> None:
        """Caches the prompts whose prefill a forward finished.

        Args:
            before: which requests of the batch were in prefill before the forward
        """
        for i, (was_prefill, is_prefill) in enumerate(zip(before, batch.prefilling_mask, strict=True)):
            owner = getattr(batch.stopping_criterias[i], OWNER, None)
            if was_prefill and not is_prefill and owner is not None:
                tokens = batch.all_input_ids[i][: batch.prompt_lengths[i]]
                self.cache.keep(owner, tokens, self._model.kv_cache, batch.block_tables[i])


def reserve_prefixes(model: Any, num_tokens: int) -> PrefixReuse:
    """Allocates the blocks of the prefix cache before TGI sizes its own KV cache from the memory that is left.

    Raises:
        RuntimeError: they do not fit.
    """
    from text_generation_server.models.globals import BLOCK_SIZE  # pyright: ignore[reportMissingImports]

    blocks = num_blocks(num_tokens, BLOCK_SIZE)
    sizes = (model.num_layers, model.num_kv_heads, model.head_size)
    try:
        model.init_kv_cache(blocks, *sizes, model.kv_cache_dtype, model.device)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"the KV cache of PREFT_PREFIX_TOKENS={num_tokens} tokens does not fit beside the model: lower it"
        ) from error
    layers, model.kv_cache = [(layer.key, layer.value) for layer in model.kv_cache], []
    return PrefixReuse(PrefixCache(layers, BLOCK_SIZE), model)
