"""Compiles the kernels before a request needs them: each variant takes about a second, once per machine."""

from collections.abc import Iterable, Iterator

import torch

from preft_core.ops import triton as ops
from preft_core.ops.launch import tile_counts
from preft_core.ops.weights import Weights
from preft_core.rule.tiles import TILE_ROWS
from preft_core.rule.tokens import Segments


def warm_up(weights: Iterable[Weights]) -> int:
    """Runs the ops on rows of zeros, in every variant that a batch with these weights can need. Changes no slot.

    Inputs and outputs are contiguous and 16-byte aligned, as a model's are; other variants compile on first use.

    Args:
        weights: of all sites; one of each shape is run
    Returns: the number of ops that were run.
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
    """Yields segments whose tiles have one row each: of every tile size, in every number that changes the launch."""
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
