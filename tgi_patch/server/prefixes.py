"""A prefix cache that keeps adapters apart: KV of finished prompts, copied into blocks of our own."""

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
"""Attribute of a request's stopping criterion: who made its prompt's KV, None where it is not to be kept."""
MIN_UNIT = 16
"""Tokens that are kept or found together, at least. TGI's block may be of one token."""


@dataclass(frozen=True)
class Found:
    """The beginning of a prompt that is in the cache: units of the store, and how many tokens they are."""

    units: tuple[int, ...] = ()
    num_tokens: int = 0


class PrefixCache:
    """KV by (owner, tokens). The owner is an adapter's key in the pool, which no other adapter ever has, or the base.

    Units of whole blocks are copied, so the layout inside of a block is TGI's own affair. A unit is found only
    together with all that come before it, as its key is a hash over the owner and all tokens up to its end. What was
    not used for longest makes room, the end of a prompt before its beginning.

    Args:
        layers: key and value tensors of each layer, (num_blocks, ...), as TGI makes them: the store
        block_size: tokens in a block
    Attributes:
        unit: tokens in a unit
        hit_tokens, asked_tokens: prompt tokens that were found, and that were looked for, since the start
        evictions: units that made room
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
        """Returns the longest beginning that is kept. A prompt's last token is never in it: it is computed always."""
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
        """Copies what was found into a request's own blocks.

        Args:
            kv_cache: TGI's, with `key` and `value` of each layer
            blocks: of the request, in the order of its tokens
        """
        self._copy(found.units, kv_cache, blocks, into_store=False)

    def keep(self, owner: str, tokens: Sequence[int], kv_cache: Sequence[Any], blocks: Sequence[int]) -> None:
        """Copies the whole units of a finished prompt that are not kept yet.

        Args:
            tokens: of the prompt, no generated one
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
        # only now can they be found
        self._units.update(zip((keys[i] for i in begins), units, strict=True))
        self._touch(keys)

    def statistics(self) -> dict[str, float]:
        """Returns counts since the start, under names that a metric may have."""
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
        """Makes keys of one prompt the last to be dropped, its beginning after its end."""
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
    """Returns how many of TGI's blocks are kept and found together."""
    return math.ceil(MIN_UNIT / block_size)


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Returns how many blocks hold so many tokens, in whole units, one at least."""
    per_unit = blocks_per_unit(block_size)
    return max(num_tokens // (block_size * per_unit), 1) * per_unit


def _plain(tensor: Tensor) -> Tensor:
    """Returns 8-bit floats as bytes: they are copied only, and not every device indexes them."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
