"""Selects the prefill rows of a layer's input, and adds updates to those of its output."""

from typing import Any

import torch
from torch import Tensor

from preft_hf.layers.phase import PrefillRows


def rows_of(x: Tensor, phase: PrefillRows) -> Tensor:
    """Returns the prefill rows of x, (batch, length, width) or flattened, as (rows, width); all rows under compile."""
    rows = flat(x, tuple(phase.mask.shape))
    return rows if phase.index is None else rows.index_select(0, phase.index.to(x.device))


def flat(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns x, (batch, length, width) or flattened, as (batch * length, width)."""
    batch, length = shape
    if x.shape[:-1] not in ((batch, length), (batch * length,)):
        raise RuntimeError(
            f"a PreFT adapter layer got input of shape {tuple(x.shape)} in a forward of {batch} rows of {length} "
            "tokens whose adapters differ, so it cannot tell them apart: leave this layer out with exclude_modules"
        )
    return x.reshape(-1, x.shape[-1])


def masked(update: Tensor, phase: PrefillRows, shape: torch.Size) -> Tensor:
    """Returns the update of all rows (rows, width) in the shape given, zero on decode rows."""
    return (update * phase.mask.to(update.device).reshape(-1, 1)).view(shape)


def cast(x: Tensor, parameter: Tensor) -> Tensor:
    """Returns x in the adapter's dtype, except where autocast chooses the dtype of the matrix products itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)


def check_present(parameter: Tensor, x: Tensor) -> None:
    """Raises a RuntimeError if an adapter's weights were offloaded: accelerate's hooks do not load them."""
    if parameter.device.type == "meta" and x.device.type != "meta":
        raise RuntimeError(
            f"a PreFT adapter's weights are on the meta device and its input on {x.device}: offloading (accelerate's "
            "cpu_offload or disk_offload, a device_map with disk, layers on a CPU beside a GPU) does not bring them "
            "back; load the base model without it, quantised or on more devices"
        )


def check_slots(slots: Tensor, x: Tensor) -> None:
    """Raises a RuntimeError if a pool's slots are not on its model's device: they do not move with the model."""
    check_present(slots, x)
    if slots.device != x.device:
        raise RuntimeError(
            f"the slots of the model's PreftPool are on {slots.device} and the model is on {x.device} now: move the "
            "model first, then make the pool; pool.close() removes this one"
        )


def add_rows_(output: Tensor, index: Tensor, update: Tensor) -> Tensor:
    """Adds update (rows, width) to rows of output (..., width), in place, and returns output.

    Args:
        index: int64, (rows,), rows of the flattened output, without duplicates
    """
    result: Any = _AddRows.apply(output, index, update)
    return result


def rows_added(x: Tensor, index: Tensor, update: Tensor) -> Tensor:
    """Returns a copy of x (..., width) with update (rows, width) added to its rows at index."""
    return x.flatten(0, -2).index_add(0, index, update).view(x.shape)


class _AddRows(torch.autograd.Function):
    """index_add_ that saves only the index for its backward; PyTorch's saves the update too, for its shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, index: Tensor, update: Tensor) -> Tensor:  # pyright: ignore
        ctx.mark_dirty(output)
        ctx.save_for_backward(index)
        output.view(-1, output.shape[-1]).index_add_(0, index, update)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:  # pyright: ignore
        (index,) = ctx.saved_tensors
        return gradient, None, gradient.reshape(-1, gradient.shape[-1]).index_select(0, index)
