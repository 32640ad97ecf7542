"""Adapter arithmetic: what an adapter adds to the rows it applies to.

Dimensions in tensor names: T tokens (any leading dimensions), S slots, L layers that share an input, R rank, D input
width, N output width. The residual stream of a decoder layer has D == N.

`lora_update`, `direft_update` and `loreft_update` are differentiable and compute the update of one adapter.
`add_lora_`, `lora_linear` and `add_direft_` apply many adapters to one batch, for inference: with Triton kernels
(`triton`) on CUDA devices and with matrix products (`cpu`) elsewhere. `reference` is the specification of all.
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
    "warm_up",
]


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """Adds to each adapted row of a packed batch the LoRA update of its own slot; other rows are unchanged.

        for row, slot in adapted rows:
            for l, columns in enumerate(the L slices of the N columns, of the given widths):
                output[row, columns] += b[slot, columns] @ (a[slot, l] @ x[row])

    Args:
        output_TN: (T, N), floating point, changed in place; any strides. The outputs of layers that share their input
            (q, k, v; gate, up) lie side by side in it
        x_TD: (T, D), the layers' input, dtype and device of output
        a_SLRD: (S, L, R, D), dtype and device of output, contiguous within a slot
        b_SNR: (S, N, R), dtype and device of output, contiguous within a slot, scaling folded in
        widths: output columns of each of the L layers; their sum is N. The Triton kernels take up to 3 layers
        segments: of the T rows
    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an input with requires_grad=True.
    Source: arXiv 2106.09685, section 4.1; grouped by adapter as in arXiv 2310.18547 (SGMV), without decode rows.
    """
    shapes = ((segments.num_rows, sum(widths)), *_lora_shapes(a_SLRD, widths, segments))
    _check(("output", "x", "a", "b"), (output_TN, x_TD, a_SLRD, b_SNR), shapes)
    with _own_dtypes(output_TN.device.type):
        _implementation(output_TN.device.type).add_lora_(output_TN, x_TD, a_SLRD, b_SNR, widths, segments)


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """Adds to each adapted row of a packed batch the DiReFT update of its own slot; other rows are unchanged.

        for row, slot in adapted rows:
            hidden[row] += b[slot] @ (a[slot] @ hidden[row] + bias[slot])

    LoReFT is the same with a = A - Q and b = Q^T, where Q = `orthonormal_rows`(R).

    Args:
        hidden_TD: (T, D), floating point, output of a decoder layer, changed in place; any strides
        a_SRD: (S, R, D), dtype and device of hidden, contiguous within a slot
        b_SDR: (S, D, R), dtype and device of hidden, contiguous within a slot, scaling folded in
        bias_SR: (S, R), dtype and device of hidden
        segments: of the T rows
    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an input with requires_grad=True.
    Source: arXiv 2404.03592, section 3.2; grouped by adapter, without decode rows.
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
    """Returns the output of linear layers that share an input, plus the LoRA update of each adapted row's slot.

        output = x @ weight.T
        add_lora_(output, x, a, b, widths, segments)

    On a CUDA device this is faster than the two calls.

    Args:
        x_TD: (T, D), floating point, the layers' input
        weight_ND: (N, D), dtype and device of x, the layers' weights one below the other
        a_SLRD, b_SNR, widths, segments: as in `add_lora_`
    Returns: (T, N), a new tensor in x's dtype.
    Raises:
        ValueError: shapes, dtypes or devices that do not match, or an input with requires_grad=True.
    Source: as `add_lora_`.
    """
    shape_of_x, *others = _lora_shapes(a_SLRD, widths, segments)
    shapes = (shape_of_x, (sum(widths), a_SLRD.shape[3]), *others)
    _check(("x", "weight", "a", "b"), (x_TD, weight_ND, a_SLRD, b_SNR), shapes)
    with _own_dtypes(x_TD.device.type):
        return _implementation(x_TD.device.type).lora_linear(x_TD, weight_ND, a_SLRD, b_SNR, widths, segments)


def warm_up(weights: Iterable[Weights]) -> int:
    """Compiles every kernel variant that batches with these weights can need, so that no request waits for it.

    Args:
        weights: of all sites of a pool's buckets (`SlotPool.weights`). Slots are not changed
    Returns: the number of ops that were run; 0 where nothing is compiled: off CUDA, or without Triton.
    """
    found = list(weights)
    if not found or found[0].a.device.type != "cuda" or _implementation("cuda") is cpu:
        return 0
    from preft_core.ops.warm import warm_up

    return warm_up(found)


def _own_dtypes(device_type: str) -> AbstractContextManager[object]:
    """Returns a context without autocast, which would change the dtypes of some of an op's products."""
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
            f"Triton cannot be imported ({error}): a batch of several adapters runs as a loop of matrix products, "
            "which is slower; pip install triton",
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
            raise ValueError(f"{'; '.join(faults)}: expected {expected}, all {dtype} on {device}")
    if is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(
            "an input of a batch with several adapters has requires_grad=True, and these ops are for inference: call "
            "the model under torch.no_grad(), or train one adapter at a time"
        )
