"""Modules by name where torch.compile, FSDP and checkpointing wrappers stand between them."""

from typing import Any

from torch import nn

from preft_core.format.names import WRAPPERS, plain_name

__all__ = ["is_inside_wrapper", "plain_name", "submodule", "unwrapped"]


def is_inside_wrapper(name: str) -> bool:
    """Returns True for the inner module of a wrapper, whose plain name is the wrapper's."""
    return name.rpartition(".")[2] in WRAPPERS


def unwrapped(module: Any) -> nn.Module:
    """Returns the innermost module of one that is wrapped; other modules as they are."""
    while inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None):
        module = inner
    return module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of this plain name, which may be a wrapper itself.

    Raises:
        AttributeError: there is no such module.
    """
    module: Any = model
    for part in name.split(".") if name else ():
        module = getattr(unwrapped(module), part)
    return module
