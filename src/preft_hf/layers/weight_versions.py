"""Versions of adapter weights: PyTorch's counters, kept right for optimizers whose kernels do not move them."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Tracked:
    """The ids of tensors whose version somebody has read. An id that is reused costs one increment too many."""

    def __init__(self) -> None:
        self.ids: set[int] = set()

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Increments the versions of the tracked parameters of an optimizer.

        Fused kernels, PyTorch's and others', write weights without doing so.
        """
        changed = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self.ids]
        changed = [p for p in changed if not p.is_inference()]
        if changed:
            torch.autograd.graph.increment_version(changed)


@functools.cache
def _tracked() -> _Tracked:
    tracked = _Tracked()
    register_optimizer_step_post_hook(tracked.after_step)
    return tracked


def version_of(tensor: Tensor) -> int:
    """Returns a number that changes when an optimizer or an in-place operation changes the tensor.

    A write through `.data` or NumPy, or under `torch.inference_mode`, does not change it.
    """
    if tensor.is_inference():
        return 0
    _tracked().ids.add(id(tensor))
    return tensor._version
