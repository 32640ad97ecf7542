"""Splits the rows of a batch into tiles, on the host or on the device: the integer work behind `Segments`."""

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = -1
"""The slot of rows without an adapter."""
TILE_ROWS = (16, 32, 64)
"""The tile sizes that the kernels take, in rows."""


def choose_tile_rows(num_adapted: int, num_slots: int) -> int:
    """Returns the rows per tile for a batch: the largest of 16, 32, 64 that a slot fills on average.

    Args:
        num_adapted: adapted rows of the batch
        num_slots: slots that they belong to
    """
    mean = num_adapted / max(num_slots, 1)
    return max((size for size in TILE_ROWS if size <= mean), default=TILE_ROWS[0])


def checked_tile_rows(tile_rows: int | None) -> int | None:
    """Returns tile_rows. Raises ValueError if it is not a tile size or None."""
    if tile_rows is not None and tile_rows not in TILE_ROWS:
        raise ValueError(f"tile_rows is {tile_rows}: the kernels take {TILE_ROWS}; omit it to have it chosen")
    return tile_rows


def consecutive(begins: Tensor, lengths: Tensor) -> Tensor:
    """Returns begin, begin + 1, ..., begin + length - 1 of each pair, concatenated: int32, (sum of lengths,)."""
    offsets = lengths.cumsum(0, dtype=torch.int32) - lengths
    total = int(lengths.sum())
    return torch.repeat_interleave(begins - offsets, lengths, output_size=total) + torch.arange(
        total, dtype=torch.int32
    )


def sum_runs(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Returns (slots, counts), where adjacent pairs with the same slot are merged and their counts added."""
    slots: list[int] = []
    counts: list[int] = []
    for slot, count in pairs:
        if slots and slots[-1] == slot:
            counts[-1] += count
        else:
            slots.append(slot)
            counts.append(count)
    return slots, counts


def tiles_of(slots: list[int], counts: list[int], tile_rows: int) -> Tensor:
    """Returns the tiles of groups of rows: int32, (num_tiles, 3)."""
    tiles, first = [], 0
    for slot, count in zip(slots, counts, strict=True):
        tiles += [(first + i, min(tile_rows, count - i), slot) for i in range(0, count, tile_rows)]
        first += count
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3)


def tiles_on_device(mask: Tensor, slots: Sequence[int], tile_rows: int | None) -> tuple[Tensor, Tensor, int]:
    """Returns (rows, tiles, tile_rows) as in `Segments` for a mask on a device, without synchronising with it.

    Rows are sorted by slot on the device. The table of tiles is long enough for any mask.
    """
    low = [slot for slot in slots if slot < BASE]
    if low:
        raise ValueError(f"slots contains {low[0]}: a slot is 0 or more, or {BASE} for no adapter")
    distinct = sorted({slot for slot in slots if slot != BASE})
    num_rows, num_groups = mask.numel(), len(distinct)
    size = checked_tile_rows(tile_rows) or choose_tile_rows(num_rows, num_groups)
    number = {slot: i for i, slot in enumerate(distinct)} | {BASE: num_groups}
    host = torch.tensor([number[slot] for slot in slots] + distinct, dtype=torch.int64)
    sent = (host.pin_memory() if mask.device.type == "cuda" else host).to(mask.device, non_blocking=True)
    group_of_row, slot_of_group = sent[: len(slots)], sent[len(slots) :]
    # rows that are not adapted get the last group, which has no tile
    group = torch.where(mask, group_of_row[:, None], num_groups).flatten()
    rows = group.argsort(stable=True).to(torch.int32)
    ones = torch.ones_like(group)
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=mask.device).index_add_(0, group, ones)[:-1]
    num_tiles = (counts + size - 1) // size
    tile = torch.arange(num_rows // size + num_groups, device=mask.device)
    last_tile = num_tiles.cumsum(0)
    owner = torch.searchsorted(last_tile, tile, right=True)
    used = owner < num_groups
    owner = owner.clamp(max=max(num_groups - 1, 0))
    if num_groups == 0:
        return rows, torch.zeros(0, 3, dtype=torch.int32, device=mask.device), size
    within = (tile - (last_tile - num_tiles)[owner]) * size
    first = (counts.cumsum(0) - counts)[owner] + within
    count = torch.where(used, (counts[owner] - within).clamp(max=size), 0)
    tiles = torch.stack([torch.where(used, first, 0), count, slot_of_group[owner]], dim=1).to(torch.int32)
    return rows, tiles, size
