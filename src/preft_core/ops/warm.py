"""Compiles the kernels before a request needs them: a form of a kernel takes about a second, once per machine."""

from collections.abc import Iterable, Iterator

import torch

from preft_core.ops import triton as ops
from preft_core.ops.launch import tile_counts
from preft_core.ops.weights import Weights
from preft_core.rule.tiles import TILE_ROWS
from preft_core.rule.tokens import Segments


def warm_up(weights: Iterable[Weights]) -> int:
    """Runs the ops on a few rows of zeros in every form that a batch of these adapters can need. Changes no slot.

    Inputs and outputs are contiguous and begin at multiples of 16 bytes, as a model's do; others compile when they
    come.

    Args:
        weights: of all sites; one of each shape is enough, and the others are left out
    Returns: how many ops were run.
    """
    kinds = {(one.a.shape[1:], one.b.shape[1:], one.widths, one.bias is None): one for one in weights}
    runs = [(one, segments) for one in kinds.values() for segments in _segments(one)]
    for one, segments in runs:
        x = one.a.new_zeros(segments.num_rows, one.a.shape[-1])
        if one.bias is not None:
            ops.add_direft_(x, one.a[:, 0], one.b, one.bias, segments)
        else:
            output = one.a.new_zeros(segments.num_rows, one.b.shape[1])
            ops.add_lora_(output, x, one.a, one.b, one.widths, segments)
    return len(runs)


def _segments(weights: Weights) -> Iterator[Segments]:
    """Yields tiles of one row each, of every size, as many as it takes for each launch that a batch can have."""
    like = weights.a.new_zeros(0, weights.a.shape[-1])
    for tile_rows in TILE_ROWS:
        seen = set()
        for num_tiles in tile_counts(weights.b.shape[1]):
            launch = ops.launch_of(like, len(weights.widths), weights.b, num_tiles, tile_rows)
            if launch not in seen:
                seen.add(launch)
                rows = torch.arange(num_tiles, dtype=torch.int32)
                tiles = torch.stack([rows, torch.ones_like(rows), torch.zeros_like(rows)], dim=1)
                yield Segments(num_tiles, rows.to(like.device), tiles.to(like.device), tile_rows, None)
