"""Names of modules and weights without the parts that torch.compile, FSDP and checkpointing wrappers put in."""

from typing import Any

from torch import nn

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """Returns the name without wrappers' parts: "model._orig_mod.layers.0" is "model.layers.0"."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_inside_wrapper(name: str) -> bool:
    """True for the inner module of a wrapper, whose plain name is the wrapper's."""
    return name.rpartition(".")[2] in WRAPPERS


def unwrapped(module: Any) -> nn.Module:
    """Returns the innermost module of one that torch.compile, FSDP or a checkpointing wrapper was put around."""
    while inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None):
        module = inner
    return module


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns the module of this plain name, itself perhaps a wrapper.

    Raises:
        AttributeError: there is no such module.
    """
    module: Any = model
    for part in name.split(".") if name else ():
        module = getattr(unwrapped(module), part)
    return module
