"""A prefix cache keyed by adapter: KV of finished prompts, copied to blocks that TGI's router does not know."""

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OWNER = "__preft_owner__"
"""Attribute of a request's stopping criterion: the owner of its prompt's KV; None if it is not kept."""
MIN_UNIT = 16
"""Fewest tokens that are kept or found together. A block of TGI's may have one token."""


@dataclass(frozen=True)
class Found:
    """The cached prefix of a prompt: units of the store, and their number of tokens."""

    units: tuple[int, ...] = ()
    num_tokens: int = 0


class PrefixCache:
    """KV by (owner, tokens). The owner is the base model or an adapter's key in the pool, which is never used again.

    Whole blocks are copied, so the layout inside a block does not matter. A unit's key is a hash over the owner and
    all tokens up to the unit's end, so a unit is found only together with all before it. The least recently used unit
    is evicted first, the end of a prompt before its beginning.

    Args:
        layers: key and value tensors of each layer, (num_blocks, ...), as TGI makes them: the store
        block_size: tokens in a block
    Attributes:
        unit: tokens in a unit
        hit_tokens, asked_tokens: prompt tokens found and looked up since the start
        evictions: units evicted since the start
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], block_size: int):
        self._layers = [tuple(_plain(part) for part in layer) for layer in layers]
        self._block_size = block_size
        self._blocks_per_unit = blocks_per_unit(block_size)
        self.unit = block_size * self._blocks_per_unit
        self.capacity = layers[0][0].shape[0] // self._blocks_per_unit
        self._units: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(self.capacity))
        self.hit_tokens = self.asked_tokens = self.evictions = 0

    def find(self, owner: str, tokens: Sequence[int]) -> Found:
        """Returns the longest cached prefix. It never includes a prompt's last token, which is always computed."""
        self.asked_tokens += len(tokens)
        keys = self._keys(owner, tokens, (len(tokens) - 1) // self.unit)
        present = []
        for key in keys:
            if key not in self._units:
                break
            present.append(key)
        self._touch(present)
        self.hit_tokens += len(present) * self.unit
        return Found(tuple(self._units[key] for key in present), len(present) * self.unit)

    def fill(self, found: Found, kv_cache: Sequence[Any], blocks: Sequence[int]) -> None:
        """Copies a cached prefix into a request's blocks.

        Args:
            kv_cache: TGI's, with `key` and `value` of each layer
            blocks: of the request, in the order of its tokens
        """
        self._copy(found.units, kv_cache, blocks, into_store=False)

    def keep(self, owner: str, tokens: Sequence[int], kv_cache: Sequence[Any], blocks: Sequence[int]) -> None:
        """Copies the whole units of a finished prompt that are not cached yet.

        Args:
            tokens: of the prompt, without generated ones
            blocks: that hold its KV, in the order of its tokens
        """
        keys = self._keys(owner, tokens, min(len(tokens) // self.unit, self.capacity))
        self._touch([key for key in keys if key in self._units])
        begins = [i for i, key in enumerate(keys) if key not in self._units]
        units = [self._take() for _ in begins]
        per_unit = self._blocks_per_unit
        chosen = [blocks[i * per_unit + j] for i in begins for j in range(per_unit)]
        try:
            self._copy(units, kv_cache, chosen, into_store=True)
        except BaseException:
            self._free += units
            raise
        # findable only after the copy
        self._units.update(zip((keys[i] for i in begins), units, strict=True))
        self._touch(keys)

    def statistics(self) -> dict[str, float]:
        """Returns counts since the start, by metric name."""
        return {
            "prefix_units": self.capacity,
            "prefix_units_used": len(self._units),
            "prefix_asked_tokens": self.asked_tokens,
            "prefix_hit_tokens": self.hit_tokens,
            "prefix_evictions": self.evictions,
        }

    def _keys(self, owner: str, tokens: Sequence[int], num_units: int) -> list[bytes]:
        keys, key = [], hashlib.sha256(owner.encode()).digest()
        for i in range(num_units):
            part = tokens[i * self.unit : (i + 1) * self.unit]
            key = hashlib.sha256(key + struct.pack(f"<{len(part)}q", *part)).digest()
            keys.append(key)
        return keys

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Makes the units of one prompt the most recently used, its beginning after its end."""
        for key in reversed(keys):
            self._units.move_to_end(key)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self.evictions += 1
        return self._units.popitem(last=False)[1]

    def _copy(self, units: Sequence[int], kv_cache: Sequence[Any], blocks: Sequence[int], into_store: bool) -> None:
        if not units:
            return
        per_unit = self._blocks_per_unit
        device = self._layers[0][0].device
        kept = torch.tensor([unit * per_unit + j for unit in units for j in range(per_unit)], device=device)
        own = torch.tensor(list(blocks[: len(kept)]), device=device)
        for store, layer in zip(self._layers, kv_cache, strict=True):
            for ours, theirs in zip(store, (_plain(layer.key), _plain(layer.value)), strict=True):
                if into_store:
                    ours[kept] = theirs[own]
                else:
                    theirs[own] = ours[kept]


def blocks_per_unit(block_size: int) -> int:
    """Returns the number of TGI's blocks in a unit."""
    return math.ceil(MIN_UNIT / block_size)


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Returns the number of blocks for num_tokens, in whole units, at least one."""
    per_unit = blocks_per_unit(block_size)
    return max(num_tokens // (block_size * per_unit), 1) * per_unit


def _plain(tensor: Tensor) -> Tensor:
    """Returns 8-bit floats as bytes, since not every device can index them."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
