"""The grouped ops as Triton kernels, for CUDA devices. TRITON_INTERPRET=1 runs them on a CPU, slowly, for tests.

Two launches per op. `_shrink_kernel` reads each tile of rows once for all layers that share it and writes the R values
of each layer and row, in float32; a long input is cut into parts whose sums are added in the next launch, in a fixed
order, so results do not depend on timing. `_expand_kernel` adds their product with B to the output in place. Rows that
are in no tile, decode rows among them, cost nothing.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from preft_core.ops.launch import Launch, launch_for
from preft_core.tokens import Segments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_PARTS = 3


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """See `reference.add_lora_`. In 16 bit the R intermediate values of a row are rounded as the matrix units do."""
    if len(widths) > MAX_PARTS:
        raise ValueError(f"{len(widths)} layers share an input: the kernel takes up to {MAX_PARTS}; call it for fewer")
    if segments.tiles.shape[0] == 0:
        return
    launch = _launch(x_TD, len(widths), b_SNR, segments)
    low = _shrink(x_TD, a_SLRD.flatten(1, 2), segments, launch)
    _expand(output_TN, low, b_SNR, None, widths, segments, launch)


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """See `reference.add_direft_`. In 16 bit the R intermediate values of a row are rounded as the matrix units do."""
    if segments.tiles.shape[0] == 0:
        return
    launch = _launch(hidden_TD, 1, b_SDR, segments)
    low = _shrink(hidden_TD, a_SRD, segments, launch)
    _expand(hidden_TD, low, b_SDR, bias_SR, (hidden_TD.shape[1],), segments, launch)


def _launch(x_TD: Tensor, num_parts: int, b_SNR: Tensor, segments: Segments) -> Launch:
    capability = torch.cuda.get_device_capability(x_TD.device) if x_TD.is_cuda else (0, 0)
    rank = b_SNR.shape[2]
    bytes_per_number = 4 if _widens(x_TD) else x_TD.element_size()
    num_tiles = segments.tiles.shape[0]
    return launch_for(
        capability, num_tiles, segments.tile_rows, x_TD.shape[1], num_parts * rank, rank, bytes_per_number
    )


def _widens(x: Tensor) -> bool:
    """True where operands become float32: float16 sums could leave its range, and the interpreter has no bfloat16."""
    return INTERPRETED or x.dtype == torch.float16


def _shrink(x_TD: Tensor, a_SCD: Tensor, segments: Segments, launch: Launch) -> Tensor:
    """Returns x @ a^T for the adapted rows, in parts: float32, (split, rows in `segments.rows`, C)."""
    num_columns, width = a_SCD.shape[1:]
    low = torch.empty(launch.split, segments.rows.numel(), num_columns, dtype=torch.float32, device=x_TD.device)
    grid = (segments.tiles.shape[0], triton.cdiv(num_columns, launch.block_columns), launch.split)
    _shrink_kernel[grid](
        x_TD,
        a_SCD,
        low,
        segments.rows,
        segments.tiles,
        x_TD.stride(0),
        x_TD.stride(1),
        a_SCD.stride(0),
        low.stride(0),
        width,
        num_columns,
        TILE_ROWS=segments.tile_rows,
        BLOCK_C=launch.block_columns,
        BLOCK_D=launch.block_in,
        SPLIT=launch.split,
        WIDEN=INTERPRETED,
        num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
    )
    return low


def _expand(
    output_TN: Tensor,
    low: Tensor,
    b_SNR: Tensor,
    bias_SR: Tensor | None,
    widths: tuple[int, ...],
    segments: Segments,
    launch: Launch,
) -> None:
    rank = b_SNR.shape[2]
    blocks = [triton.cdiv(width, launch.block_out) for width in widths]
    padded = (*widths, 0, 0)
    _expand_kernel[(segments.tiles.shape[0], sum(blocks))](
        output_TN,
        low,
        b_SNR,
        b_SNR if bias_SR is None else bias_SR,
        segments.rows,
        segments.tiles,
        output_TN.stride(0),
        output_TN.stride(1),
        b_SNR.stride(0),
        0 if bias_SR is None else bias_SR.stride(0),
        low.stride(0),
        low.stride(1),
        padded[0],
        padded[1],
        padded[2],
        RANK=rank,
        NUM_PARTS=len(widths),
        HAS_BIAS=bias_SR is not None,
        TILE_ROWS=segments.tile_rows,
        BLOCK_R=max(triton.next_power_of_2(rank), 16),
        BLOCK_N=launch.block_out,
        SPLIT=launch.split,
        WIDEN=_widens(output_TN),
        num_warps=launch.num_warps,  # pyright: ignore[reportCallIssue]
        num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
    )


@triton.jit
def _shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    rows_ptr,
    tiles_ptr,
    stride_x_row,
    stride_x_column,
    stride_a_slot,
    stride_low_part,
    width,
    num_columns,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2).to(tl.int64)
    if count == 0:
        return
    part = tl.program_id(2)
    t = tl.arange(0, TILE_ROWS)
    in_tile = t < count
    row = tl.load(rows_ptr + first + t, mask=in_tile, other=0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    x_rows = x_ptr + row[:, None] * stride_x_row
    a_rows = a_ptr + slot * stride_a_slot + c[None, :].to(tl.int64) * width
    total = tl.zeros((TILE_ROWS, BLOCK_C), dtype=tl.float32)
    for _ in range(part * BLOCK_D, width, SPLIT * BLOCK_D):
        x = tl.load(x_rows + d[None, :] * stride_x_column, mask=in_tile[:, None] & (d[None, :] < width), other=0.0)
        a = tl.load(a_rows + d[:, None], mask=(d[:, None] < width) & (c[None, :] < num_columns), other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            a = a.to(tl.float32)
        total = tl.dot(x, a, total, input_precision="ieee")
        d += SPLIT * BLOCK_D
    low = low_ptr + part.to(tl.int64) * stride_low_part + (first + t[:, None]) * num_columns + c[None, :]
    tl.store(low, total, mask=in_tile[:, None] & (c[None, :] < num_columns))


@triton.jit
def _place_of_block(block, width_0, width_1, width_2, NUM_PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    # the block's layer, the first column of this layer in the output, its width, the block's number in the layer
    part = block * 0
    begin = block * 0
    width = width_0
    if NUM_PARTS > 1:
        blocks = tl.cdiv(width_0, BLOCK_N)
        beyond = block >= blocks
        part = tl.where(beyond, 1, part)
        begin = tl.where(beyond, width_0, begin)
        width = tl.where(beyond, width_1, width)
        block = tl.where(beyond, block - blocks, block)
    if NUM_PARTS > 2:
        blocks = tl.cdiv(width_1, BLOCK_N)
        beyond = (part == 1) & (block >= blocks)
        part = tl.where(beyond, 2, part)
        begin = tl.where(beyond, width_0 + width_1, begin)
        width = tl.where(beyond, width_2, width)
        block = tl.where(beyond, block - blocks, block)
    return part, begin, width, block


@triton.jit
def _expand_kernel(
    output_ptr,
    low_ptr,
    b_ptr,
    bias_ptr,
    rows_ptr,
    tiles_ptr,
    stride_output_row,
    stride_output_column,
    stride_b_slot,
    stride_bias_slot,
    stride_low_part,
    stride_low_row,
    width_0,
    width_1,
    width_2,
    RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tile = tl.program_id(0)
    first = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    count = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2).to(tl.int64)
    if count == 0:
        return
    part, begin, width, block = _place_of_block(tl.program_id(1), width_0, width_1, width_2, NUM_PARTS, BLOCK_N)
    t = tl.arange(0, TILE_ROWS)
    in_tile = t < count
    r = tl.arange(0, BLOCK_R)
    low_rows = low_ptr + (first + t[:, None]) * stride_low_row + part * RANK + r[None, :]
    low_mask = in_tile[:, None] & (r[None, :] < RANK)
    low = tl.load(low_rows, mask=low_mask, other=0.0)
    for i in range(1, SPLIT):
        low += tl.load(low_rows + i * stride_low_part, mask=low_mask, other=0.0)
    if HAS_BIAS:
        low += tl.load(bias_ptr + slot * stride_bias_slot + r, mask=r < RANK, other=0.0).to(tl.float32)[None, :]
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = n < width
    column = (begin + n).to(tl.int64)
    b_rows = b_ptr + slot * stride_b_slot + column[None, :] * RANK + r[:, None]
    b = tl.load(b_rows, mask=in_width[None, :] & (r[:, None] < RANK), other=0.0)
    if WIDEN:
        update = tl.dot(low, b.to(tl.float32), input_precision="ieee")
    else:
        update = tl.dot(low.to(b.dtype), b, input_precision="ieee")
    row = tl.load(rows_ptr + first + t, mask=in_tile, other=0).to(tl.int64)
    output = output_ptr + row[:, None] * stride_output_row + column[None, :] * stride_output_column
    mask = in_tile[:, None] & in_width[None, :]
    total = tl.load(output, mask=mask, other=0.0).to(tl.float32) + update
    tl.store(output, total.to(output_ptr.dtype.element_ty), mask=mask)
