"""Names of weights without the parts that wrappers of modules put in."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The attribute under which torch.compile, FSDP and activation checkpointing keep the module they wrap."""


def plain_name(name: str) -> str:
    """Returns the name without wrappers' parts: "model._orig_mod.layers.0" is "model.layers.0"."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
