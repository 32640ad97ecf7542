"""Launch configurations of the kernels: computed from the shape, never autotuned while a request waits."""

import functools
from typing import NamedTuple

SHARED_MEMORY = {(8, 0): 160 << 10, (9, 0): 220 << 10, (10, 0): 220 << 10}
"""Bytes of shared memory per program, by compute capability, minus a reserve for the compiler."""
SAFE_SHARED_MEMORY = 60 << 10
MIN_PROGRAMS = 128
MAX_SPLIT = 8
BLOCKS_OUT = 4


class Launch(NamedTuple):
    """How the kernels of one op are launched.

    Attributes:
        split: parts that the input width is split into, each summed by its own program
        block_in: input columns per step of the shrink
        block_columns: of the L * R columns, how many one program of the shrink computes
        block_out: output columns per step of the expand
        blocks_out: steps per program of the expand
        num_warps: of both kernels
        num_stages: steps of the shrink that are loaded ahead
        out_stages: steps of the expand that are loaded ahead
    """

    split: int
    block_in: int
    block_columns: int
    block_out: int
    blocks_out: int
    num_warps: int
    num_stages: int
    out_stages: int


@functools.lru_cache(maxsize=4096)
def launch_for(
    capability: tuple[int, int],
    num_tiles: int,
    tile_rows: int,
    width: int,
    num_columns: int,
    rank: int,
    width_out: int,
    bytes_per_number: int,
) -> Launch:
    """Returns a configuration that fits the device.

    The input width is split when tiles alone would leave multiprocessors idle (sm_80 has 108, sm_90 132). Batches of
    different sizes may therefore sum in a different order, and differ in the last bits of float32.

    Args:
        capability: compute capability; (0, 0) in the interpreter
        num_tiles, tile_rows: of the segments
        width: D, the input's columns
        num_columns: L * R
        rank: R
        width_out: N, the output's columns
        bytes_per_number: 2 or 4, of the operands of the matrix products
    """
    budget = SHARED_MEMORY.get(capability, SAFE_SHARED_MEMORY)
    split = 1
    while num_tiles * split < MIN_PROGRAMS and split < MAX_SPLIT and width // (2 * split) >= 256:
        split *= 2
    block_columns = min(power_of_two(num_columns), 128)
    # the widest step that fits, then as many stages as fit
    per_column = (tile_rows + block_columns) * bytes_per_number
    block_in = next(size for size in (128, 64, 32, 16) if 2 * size * per_column <= budget or size == 16)
    num_stages = max(1, min(4, budget // (block_in * per_column)))
    per_column = (power_of_two(rank) + tile_rows) * bytes_per_number
    widest = 256 if tile_rows <= 32 else 128
    block_out = next(size for size in (256, 128, 64, 32) if size <= widest and size * per_column <= budget)
    # several steps per program, loaded ahead, where enough programs remain; slower for short tiles
    blocks_out = BLOCKS_OUT if tile_rows > 32 and num_tiles * width_out >= _wide(block_out) else 1
    spare = budget - tile_rows * power_of_two(rank) * bytes_per_number
    out_stages = max(1, min(3, spare // (block_out * per_column))) if blocks_out > 1 else 1
    num_warps = 8 if tile_rows > 32 else 4
    return Launch(split, block_in, block_columns, block_out, blocks_out, num_warps, num_stages, out_stages)


def tile_counts(width_out: int) -> list[int]:
    """Returns the numbers of tiles at which the result of `launch_for` may change, 1 first."""
    splits = [2**i for i in range(MAX_SPLIT.bit_length())]
    found = {1, *(MIN_PROGRAMS // split for split in splits if split < MAX_SPLIT)}
    return sorted(found | {-(-_wide(block) // width_out) for block in (32, 64, 128)})


def _wide(block_out: int) -> int:
    """Returns the number of tiles times columns from which a program takes several steps of the expand."""
    return 2 * BLOCKS_OUT * block_out * MIN_PROGRAMS


def power_of_two(count: int) -> int:
    """Returns the smallest power of two >= count, at least 16, the minimum of `tl.dot`."""
    return max(16, 1 << (count - 1).bit_length())
