"""The grouped ops as Triton kernels, for CUDA devices. TRITON_INTERPRET=1 runs them on a CPU, slowly, for tests.

Each op is two launches:

    low = x[rows] @ A.T                     shrink_kernel: (rows, L * R), float32; x is read once for all L layers
    output[rows] += (low + bias) @ B.T      expand_kernel: in place; or =, where the base product is added next

A long input is split into parts, whose sums the second launch adds in a fixed order, so results do not depend on
timing. Rows in no tile, such as decode rows, cost nothing.
"""

import functools
import os
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from preft_core.ops import reference
from preft_core.ops.kernels import expand_kernel, shrink_kernel
from preft_core.ops.launch import Launch, launch_for, power_of_two
from preft_core.rule.tokens import Segments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_PARTS = 3


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """See `reference.add_lora_`. In 16 bit the R intermediate values of a row are rounded as the matrix units do."""
    _lora(output_TN, x_TD, a_SLRD, b_SNR, widths, segments, adds=True)


def lora_linear(
    x_TD: Tensor, weight_ND: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> Tensor:
    """See `reference.lora_linear`. Where every row has an adapter, the base product is added to the updates.

        output = update;  output.addmm_(x, weight.T)

    This saves one read of the output. In bfloat16 it rounds the updates once more. float16 takes the other way: an
    update may exceed its range.
    """
    if x_TD.dtype not in (torch.bfloat16, torch.float32) or not segments.covers_all or x_TD.shape[0] == 0:
        return reference.lora_linear(x_TD, weight_ND, a_SLRD, b_SNR, widths, segments, add_lora_)
    output = x_TD.new_empty(x_TD.shape[0], weight_ND.shape[0])
    _lora(output, x_TD, a_SLRD, b_SNR, widths, segments, adds=False)
    return output.addmm_(x_TD, weight_ND.T)


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """See `reference.add_direft_`. In 16 bit the R intermediate values of a row are rounded as the matrix units do."""
    if segments.tiles.shape[0] == 0:
        return
    with _on(hidden_TD.device):
        launch = launch_of(hidden_TD, 1, b_SDR, segments.tiles.shape[0], segments.tile_rows)
        low = _shrink(hidden_TD, a_SRD, b_SDR.shape[2], segments, launch)
        _expand(hidden_TD, low, b_SDR, bias_SR, (hidden_TD.shape[1],), segments, launch, adds=True)


def _lora(
    output: Tensor, x: Tensor, a: Tensor, b: Tensor, widths: tuple[int, ...], segments: Segments, adds: bool
) -> None:
    if len(widths) > MAX_PARTS:
        raise ValueError(f"{len(widths)} layers share an input: the kernel takes up to {MAX_PARTS}; split the call")
    if segments.tiles.shape[0] == 0:
        return
    with _on(x.device):
        launch = launch_of(x, len(widths), b, segments.tiles.shape[0], segments.tile_rows)
        low = _shrink(x, a, len(widths) * b.shape[2], segments, launch)
        _expand(output, low, b, None, widths, segments, launch, adds)


def _on(device: torch.device) -> Any:
    """Returns a context in which Triton launches on this device: it takes the current one, not that of the tensors."""
    return torch.cuda.device(device if device.type == "cuda" and device.index != torch.cuda.current_device() else -1)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def launch_of(x_TD: Tensor, num_parts: int, b_SNR: Tensor, num_tiles: int, tile_rows: int) -> Launch:
    """Returns the launch configuration of an op on num_tiles tiles; of x only dtype, device and width matter."""
    rank, width = b_SNR.shape[2], x_TD.shape[1]
    bytes_per_number = 4 if _widens(x_TD) else x_TD.element_size()
    return launch_for(
        _capability(x_TD.device),
        num_tiles,
        tile_rows,
        width,
        num_parts * rank,
        rank,
        b_SNR.shape[1],
        bytes_per_number,
    )


def _widens(x: Tensor) -> bool:
    """Returns whether operands become float32: float16 sums may overflow, and the interpreter has no bfloat16."""
    return INTERPRETED or x.dtype == torch.float16


class _Kernel:
    """A kernel whose compiled forms are cached under our own key.

    Triton inspects every argument at every launch to choose a form, which took a third of an op's host time. The key
    holds everything that this choice depends on.
    """

    def __init__(self, function: Any):
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], arguments: tuple[Any, ...], num_warps: int, num_stages: int
    ) -> None:
        """Launches on the current device.

        Args:
            key: device, dtypes, whether each pointer is a multiple of 16, every integer that Triton specialises on,
                and every constant
            arguments: all of the function's, including constants
        """
        key = key, num_warps, num_stages
        kernel = self._compiled.get(key)
        if kernel is not None:
            kernel[grid](*arguments)
            return
        kernel = self._function[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
        if not INTERPRETED:
            self._compiled[key] = kernel


_SHRINK, _EXPAND = _Kernel(shrink_kernel), _Kernel(expand_kernel)


def _shrink(x_TD: Tensor, a: Tensor, num_columns: int, segments: Segments, launch: Launch) -> Tensor:
    """Returns x @ a^T for the adapted rows, in parts: float32, (split, rows in `segments.rows`, C)."""
    low = torch.empty(launch.split, segments.rows.shape[0], num_columns, dtype=torch.float32, device=x_TD.device)
    numbers = (*x_TD.stride(), a.stride(0), x_TD.shape[1], num_columns)
    constants = (segments.tile_rows, launch.block_columns, launch.block_in, launch.split, INTERPRETED)
    aligned = x_TD.data_ptr() % 16 == 0, a.data_ptr() % 16 == 0
    _SHRINK(
        (x_TD.device, x_TD.dtype, aligned, numbers, constants),
        (segments.tiles.shape[0], -(-num_columns // launch.block_columns), launch.split),
        (x_TD, a, low, segments.rows, segments.tiles, low.stride(0), *numbers, *constants),
        launch.num_warps,
        launch.num_stages,
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
    adds: bool,
) -> None:
    """Adds low @ b^T, with the bias in low, to the adapted rows of output; adds=False overwrites them."""
    rank = b_SNR.shape[2]
    span = launch.block_out * launch.blocks_out
    numbers = (
        *output_TN.stride(),
        b_SNR.stride(0),
        0 if bias_SR is None else bias_SR.stride(0),
        *widths,
        *(0,) * (MAX_PARTS - len(widths)),
    )
    constants = (
        rank,
        len(widths),
        bias_SR is not None,
        segments.tile_rows,
        power_of_two(rank),
        launch.block_out,
        launch.blocks_out,
        launch.out_stages,
        _widens(output_TN),
        adds,
    )
    bias = b_SNR if bias_SR is None else bias_SR
    tensors = (output_TN, low, b_SNR, bias, segments.rows, segments.tiles)
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in (output_TN, b_SNR, bias))
    _EXPAND(
        (output_TN.device, output_TN.dtype, aligned, numbers, constants),
        # one dimension: the other two are limited to 65535
        (sum(-(-width // span) for width in widths) * segments.tiles.shape[0], 1, 1),
        (*tensors, low.stride(0), launch.split, *numbers, *constants),
        launch.num_warps,
        1,
    )
