"""The two Triton kernels of the grouped ops. `triton` launches them.

Arguments come in the same order in both: pointers, numbers that may differ at every launch, strides (in elements),
sizes, constants. A tile is a row (first, count, slot) of `Segments.tiles`: it covers the rows
`rows[first : first + count]` of the batch, all of one slot. A tile with count 0 is unused.

shrink_kernel: writes A x for the rows of each tile, in SPLIT parts whose sum is the result.

        for first, count, slot in tiles:
            x_tile = x[rows[first : first + count]]                                        # (count, D)
            for p in range(SPLIT):
                low[p, first : first + count] = x_tile[:, cut[p]] @ a[slot][:, cut[p]].T   # (count, C), float32

    cut[p] are the blocks p, p + SPLIT, p + 2 SPLIT, ... of BLOCK_D columns. Grid: (tiles, blocks of C, SPLIT).

    Args:
        x_ptr: (T, D = width), any strides
        a_ptr: (S, C = num_columns, D), contiguous within a slot. C is L * R: layers that share x lie one below the
            other
        low_ptr: (SPLIT, rows, C), float32, contiguous
        rows_ptr, tiles_ptr: int32, of `Segments`
        TILE_ROWS: most rows of a tile
        BLOCK_C, BLOCK_D: columns of low per program, columns of x per step
        WIDEN: converts the operands to float32 before the product

expand_kernel: adds B (low + bias) to the output rows of each tile, for each of the NUM_PARTS layers that share low.

        for first, count, slot in tiles:
            row, low_tile = rows[first : first + count], low[:, first : first + count].sum(0)    # (count, L * R)
            for l, columns in enumerate(the column slices of width_0, width_1, width_2):
                output[row][:, columns] += (low_tile[:, l * R : (l + 1) * R] + bias[slot]) @ b[slot, columns].T

    Grid: one dimension, tiles * spans, where a span is NUM_BLOCKS * BLOCK_N columns of one layer.

    Args:
        output_ptr: (T, N), any strides; N is the sum of the widths
        low_ptr: (split, rows, L * R), float32, contiguous, as `shrink_kernel` writes it
        b_ptr: (S, N, R), contiguous within a slot
        bias_ptr: (S, R); any pointer without HAS_BIAS
        rows_ptr, tiles_ptr: int32, of `Segments`
        width_0, width_1, width_2: output columns of each layer, 0 from NUM_PARTS on
        RANK, BLOCK_R: R, and R padded to what `tl.dot` takes
        TILE_ROWS: most rows of a tile
        BLOCK_N, NUM_BLOCKS, STAGES: output columns per step, steps per program, steps that are loaded ahead
        WIDEN: multiplies in float32; otherwise in b's dtype
        ADDS: adds to the output; otherwise overwrites it
"""

import triton
import triton.language as tl


@triton.jit
def _tile(pointer):
    """Returns first, count and slot of a tile. first and slot are int64: they are multiplied by strides."""
    return tl.load(pointer).to(tl.int64), tl.load(pointer + 1), tl.load(pointer + 2).to(tl.int64)


@triton.jit(do_not_specialize=["stride_low_part"], do_not_specialize_on_alignment=["rows_ptr", "tiles_ptr"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    rows_ptr,
    tiles_ptr,
    stride_low_part,
    stride_x_row,
    stride_x_column,
    stride_a_slot,
    width,
    num_columns,
    TILE_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes A x for the rows of each tile, in SPLIT parts. See the module docstring."""
    first, count, slot = _tile(tiles_ptr + tl.program_id(0) * 3)
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
def _locate(block, width_0, width_1, width_2, NUM_PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns a block's layer, the first output column of that layer, its width, and the block's index within it."""
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
def _sum_of_parts(pointers, mask, stride, split):
    """Returns the sum of split tensors that lie stride elements apart, added in order."""
    total = tl.load(pointers, mask=mask, other=0.0)
    for i in range(1, split):
        total += tl.load(pointers + i * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["stride_low_part", "split"], do_not_specialize_on_alignment=["rows_ptr", "tiles_ptr"])
def expand_kernel(
    output_ptr,
    low_ptr,
    b_ptr,
    bias_ptr,
    rows_ptr,
    tiles_ptr,
    stride_low_part,
    split,
    stride_output_row,
    stride_output_column,
    stride_b_slot,
    stride_bias_slot,
    width_0,
    width_1,
    width_2,
    RANK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Adds B (low + bias) to the output rows of each tile. See the module docstring."""
    # neighbouring programs take neighbouring columns, so that rows are read and written in long runs
    span = NUM_BLOCKS * BLOCK_N
    spans = tl.cdiv(width_0, span) + tl.cdiv(width_1, span) + tl.cdiv(width_2, span)
    first, count, slot = _tile(tiles_ptr + tl.program_id(0) // spans * 3)
    if count == 0:
        return
    part, begin, width, index = _locate(tl.program_id(0) % spans, width_0, width_1, width_2, NUM_PARTS, span)
    t = tl.arange(0, TILE_ROWS)
    in_tile = t < count
    r = tl.arange(0, BLOCK_R)
    low_rows = low_ptr + (first + t[:, None]) * (NUM_PARTS * RANK) + part * RANK + r[None, :]
    low = _sum_of_parts(low_rows, in_tile[:, None] & (r[None, :] < RANK), stride_low_part, split)
    if HAS_BIAS:
        low += tl.load(bias_ptr + slot * stride_bias_slot + r, mask=r < RANK, other=0.0).to(tl.float32)[None, :]
    if not WIDEN:
        low = low.to(b_ptr.dtype.element_ty)
    row = tl.load(rows_ptr + first + t, mask=in_tile, other=0).to(tl.int64)
    b_rows, output_rows = b_ptr + slot * stride_b_slot + r[:, None], output_ptr + row[:, None] * stride_output_row
    for i in tl.range(0, NUM_BLOCKS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        n = index * span + i * BLOCK_N + tl.arange(0, BLOCK_N)
        in_width = n < width
        column = (begin + n).to(tl.int64)
        b = tl.load(b_rows + column[None, :] * RANK, mask=in_width[None, :] & (r[:, None] < RANK), other=0.0)
        if WIDEN:
            b = b.to(tl.float32)
        update = tl.dot(low, b, input_precision="ieee")
        output = output_rows + column[None, :] * stride_output_column
        mask = in_tile[:, None] & in_width[None, :]
        if ADDS:
            update += tl.load(output, mask=mask, other=0.0).to(tl.float32)
        tl.store(output, update.to(output_ptr.dtype.element_ty), mask=mask)
