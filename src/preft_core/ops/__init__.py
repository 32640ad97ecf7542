"""Adapter arithmetic: what an adapter adds to the rows it is given.

Dimensions in tensor names: T tokens (any leading dimensions), S slots, L layers that share an input, R rank, D input
width, N output width. The residual stream of a decoder layer has D == N.

The differentiable updates of one adapter come from `reference`. `add_lora_` and `add_direft_` serve many adapters in
one batch; Triton's kernels do it on CUDA devices, `cpu` elsewhere, and `reference` says what they must compute.
"""

import functools
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, is_grad_enabled

from preft_core.ops import cpu
from preft_core.ops.reference import direft_update, lora_update, loreft_update
from preft_core.ops.weights import Weights
from preft_core.orthonormal import orthonormal_rows
from preft_core.rule.tokens import Segments

__all__ = [
    "Weights",
    "add_direft_",
    "add_lora_",
    "direft_update",
    "lora_linear",
    "lora_update",
    "loreft_update",
    "orthonormal_rows",
]


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """Adds to each adapted row of a packed batch the LoRA update of its own slot. See `reference.add_lora_`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an input that a gradient is wanted for.
    """
    shapes = ((segments.num_rows, sum(widths)), *_lora_shapes(a_SLRD, widths, segments))
    _check(("output", "x", "a", "b"), (output_TN, x_TD, a_SLRD, b_SNR), shapes)
    with _own_dtypes(output_TN.device.type):
        _implementation(output_TN.device.type).add_lora_(output_TN, x_TD, a_SLRD, b_SNR, widths, segments)


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """Adds to each adapted row of a packed batch the DiReFT update of its own slot. See `reference.add_direft_`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an input that a gradient is wanted for.
    """
    slots, rank, width = a_SRD.shape
    _check(
        ("hidden", "a", "b", "bias"),
        (hidden_TD, a_SRD, b_SDR, bias_SR),
        ((segments.num_rows, width), (slots, rank, width), (slots, width, rank), (slots, rank)),
    )
    with _own_dtypes(hidden_TD.device.type):
        _implementation(hidden_TD.device.type).add_direft_(hidden_TD, a_SRD, b_SDR, bias_SR, segments)


def lora_linear(
    x_TD: Tensor, weight_ND: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> Tensor:
    """Returns the output of layers that share an input, with the LoRA update of each adapted row's own slot.

    See `reference.lora_linear`. On a CUDA device this is faster than a product and `add_lora_` after it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an input that a gradient is wanted for.
    """
    shape_of_x, *others = _lora_shapes(a_SLRD, widths, segments)
    shapes = (shape_of_x, (sum(widths), a_SLRD.shape[3]), *others)
    _check(("x", "weight", "a", "b"), (x_TD, weight_ND, a_SLRD, b_SNR), shapes)
    with _own_dtypes(x_TD.device.type):
        return _implementation(x_TD.device.type).lora_linear(x_TD, weight_ND, a_SLRD, b_SNR, widths, segments)


def warm_up(weights: Iterable[Weights]) -> int:
    """Compiles on a CUDA device what batches of adapters with these weights can need, before a request waits for it.

    Args:
        weights: of all sites of a pool's buckets (`SlotPool.weights`); no slot is changed
    Returns: how many ops were run for it; 0 on other devices, where nothing is compiled.
    """
    found = list(weights)
    if not found or found[0].a.device.type != "cuda" or _implementation("cuda") is cpu:
        return 0
    from preft_core.ops.warm import warm_up

    return warm_up(found)


def _own_dtypes(device_type: str) -> AbstractContextManager[object]:
    """Keeps autocast from changing the dtypes of some products of an op and not of others."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


@functools.cache
def _implementation(device_type: str) -> ModuleType:
    if device_type != "cuda":
        return cpu
    try:
        from preft_core.ops import triton
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}), so adapters of a mixed batch run as a loop of matrix products, "
            "which is slower: pip install triton",
            stacklevel=3,
        )
        return cpu
    return triton


def _lora_shapes(a_SLRD: Tensor, widths: tuple[int, ...], segments: Segments) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes that x, a and b of a LoRA op must have."""
    slots, _, rank, width_in = a_SLRD.shape
    return (segments.num_rows, width_in), (slots, len(widths), rank, width_in), (slots, sum(widths), rank)


def _check(names: tuple[str, ...], tensors: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    first = tensors[0]
    dtype, device = first.dtype, first.device
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            faults = [
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                for name, tensor, shape in zip(names, tensors, shapes, strict=True)
                if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device
            ]
            expected = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            raise ValueError(f"{'; '.join(faults)}: expected is {expected}, all {dtype} on {device}")
    if is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "a gradient is wanted through adapters of a mixed batch, which are for inference: call the model under "
            "torch.no_grad(), or train one adapter at a time"
        )
