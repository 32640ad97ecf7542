"""Continuous batching: the adapters of one packed forward, and the hash of blocks that requests share."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from preft_core.pool.lease import Lease
from preft_hf.forward.routing import RoutedSpan, Routing, pool_key, routed_rows
from preft_hf.layers.phase import Phase, SharedPhase


class PackedAdapters:
    """The prefill tokens of one packed forward and their adapters, pinned until the forward ends.

    Args:
        spans: consecutive prefill tokens of one request, with the name of their adapter
        keys: name -> its `adapter_key` when the request's first tokens were computed
    """

    def __init__(self, spans: Sequence[RoutedSpan], keys: dict[str, bytes], routing: Routing):
        self._spans, self._keys, self._routing = spans, keys, routing
        self._lease: Lease | None = None

    @property
    def names(self) -> set[str]:
        """The names of the adapters."""
        return {span.name for span in self._spans}

    def phase(self, prefill: SharedPhase, shape: tuple[int, int], device: torch.device) -> Phase:
        """Returns the phase of a forward of (1, length) tokens."""
        pooled = self.names - self._routing.held()
        if pooled:
            assert self._routing.pool is not None
            self._lease = self._routing.pool.acquire(pooled, idle=self._routing.calls.sweep)
        slots = self._lease.slots if self._lease is not None else {}
        for slot in slots.values():
            if pool_key(slot) != self._keys[slot.name]:
                raise RuntimeError(changed(slot.name))
        return routed_rows(self._spans, slots, shape, device)

    def release(self) -> None:
        """Unpins the adapters."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()


class SaltedTokens(list[int]):
    """Tokens whose blocks are hashed together with the adapter that made their keys and values.

    transformers shares a block between requests by the hash of its tokens and of those before it. The blocks of an
    adapter's prompt, and those that the base model wrote after it, get extra words after the tokens: the adapter's
    key, and how many tokens of the block are prompt.
    """

    def __init__(self, tokens: Sequence[int], key: bytes, prompt_length: int):
        super().__init__(tokens)
        self._words = list(array("i", key))
        self._prompt_length = prompt_length

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice) or not self._words or len(found) < index.stop - index.start:
            # An incomplete block is not hashed.
            return found
        num_prompt = min(max(self._prompt_length - index.start, 0), len(found))
        return [*found, *self._words, num_prompt]


def changed(name: str) -> str:
    """Returns the message for an adapter that has changed since its request began."""
    return (
        f"adapter {name!r} was changed while the prompt of a request was computed with it: two adapters would read "
        "the prompt; send the request again"
    )
