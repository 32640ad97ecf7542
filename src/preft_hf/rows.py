"""Rows of a layer's input and output: the prefill ones of a forward, in the shapes that layers see them."""

import torch
from torch import Tensor

from preft_hf.phase import PrefillRows


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
