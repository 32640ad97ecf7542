"""Experts of mixture-of-experts models, which no adapter can go on: they see tokens in the order of their router."""

import re
import warnings
from collections.abc import Iterable

from torch import nn

from preft_hf.config import PreftConfig
from preft_hf.tuner.names import plain_name

_INSIDE = re.compile(r"(^|\.)experts\.")


def is_expert(name: str) -> bool:
    """Returns True for the name of a module or parameter inside a list, or a fused block, of experts."""
    return _INSIDE.search(name) is not None


def expert_weights(model: nn.Module) -> list[str]:
    """Returns the names of the experts' projections: linear layers, or fused parameters (experts, out, in)."""
    found = []
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if is_expert(name) and ".preft_" not in name and parameter.dim() in (2, 3):
            found.append(name.removesuffix(".weight"))
    # biases of fused experts have two dimensions too
    return [name for name in found if not name.endswith("bias")]


def check_experts(config: PreftConfig, model: nn.Module, linears: Iterable[str]) -> None:
    """Warns of the experts that a new LoRA-P adapter leaves out, unless its exclude_modules names them.

    Args:
        linears: names of the linear layers that an adapter can go on
    Raises:
        ValueError: a regular expression of target_modules matches experts, or an entry matches nothing else.
    """
    if config.method != "lora" or config.target_modules is None:
        return
    experts, targets = expert_weights(model), config.target_modules
    excluded = config.exclude_modules
    experts = [name for name in experts if excluded is None or not _names(excluded, name)]
    if targets == "all-linear":
        left_out = experts
    elif isinstance(targets, str):
        left_out = [name for name in experts if re.fullmatch(targets, name)]
        if left_out:
            raise ValueError(
                f"target_modules {targets!r} matches {len(left_out)} weights of experts, such as {left_out[0]}: an "
                "expert sees its tokens in the order of its router, so an adapter there cannot tell prompt tokens "
                'from others; add exclude_modules=".*experts.*", or use method="direft"'
            )
    else:
        linears = list(linears)
        only = [
            entry
            for entry in targets
            if any(_names([entry], name) for name in experts) and not any(_names([entry], name) for name in linears)
        ]
        if only:
            raise ValueError(
                f"target_modules entries {only} name experts alone: an expert sees its tokens in the order of its "
                "router, so an adapter there cannot tell prompt tokens from others; leave them out, or use "
                'method="direft"'
            )
        left_out = [name for name in experts if _names(targets, name)]
    if left_out:
        blocks = {name[: match.end()] for name in left_out if (match := _INSIDE.search(name))}
        warnings.warn(
            f"target_modules leaves out the experts of {len(blocks)} layers ({len(left_out)} weights, such as "
            f"{left_out[0]}): an expert sees its tokens in the order of its router, so a LoRA-P adapter cannot go "
            'there; method="direft" adapts the output of these layers; exclude_modules=".*experts.*" silences this',
            stacklevel=2,
        )


def _names(entries: list[str] | str, name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in entries)
