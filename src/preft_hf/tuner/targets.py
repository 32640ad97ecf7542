"""Which modules of a base model an adapter goes on: linear layers by name, decoder layers by index."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preft_hf.config import PreftConfig
from preft_hf.tuner.experts import expert_weights, is_expert
from preft_hf.tuner.names import is_inside_wrapper, plain_name, submodule

# These models use the weights of these layers without calling the module, always or in fused kernels.
BYPASSED = {
    "bamba": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"x_proj", "dt_proj", "out_proj"},
    "granitemoehybrid": {"out_proj"},
    "jamba": {"dt_proj"},
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "zamba2": {"out_proj"},
}

# Subclasses of nn.Linear in transformers that override forward and still compute a linear layer.
STILL_LINEAR = {"FalconLinear"}

MAX_SHOWN = 10
"""Faults of one kind that an error lists."""


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the decoder layers of a language model in order, by name.

    They are the elements of the first module list with as many elements as the config has layers.

    Raises:
        ValueError: the model has no such list.
    """
    config = getattr(model, "config", None)
    text_config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    inner = _decoder(model)
    for name, module in model.named_modules():
        name = plain_name(name)
        in_decoder = name == inner or name.startswith(inner + ".") or not inner
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and in_decoder:
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    raise ValueError(
        f"{type(model).__name__} has no list of {num_layers} decoder layers (config.num_hidden_layers), which "
        'layers_to_transform and adapters on decoder layers need: use method="lora" without layers_to_transform'
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns, by name, every layer that a LoRA-P adapter could go on: it reports its widths and is in no adapter.

    Experts are left out: each sees its tokens in the order of its router, so it cannot tell prompt tokens from others.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if (name.startswith(inside) and inside) or is_inside_wrapper(name):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
            if not hasattr(module, "base_layer"):
                continue
        if isinstance(module, nn.Module) and features_of(module) is not None and not is_expert(name):
            found[plain_name(name)] = module
    return found


def features_of(module: nn.Module | BaseTunerLayer) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a linear layer of any backend, None for other modules."""
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    for width_in, width_out in (
        ("in_features", "out_features"),
        ("infeatures", "outfeatures"),
        ("input_size", "output_size"),
    ):
        widths = getattr(layer, width_in, None), getattr(layer, width_out, None)
        if isinstance(widths[0], int) and isinstance(widths[1], int) and not isinstance(layer, nn.RNNBase):
            return widths[0], widths[1]
    return None


def resolve(config: PreftConfig, model: nn.Module) -> list[str]:
    """Returns the names of the modules that the adapter goes on, in the model's order, without wrappers' parts.

    Raises:
        ValueError: an entry of target_modules, exclude_modules or layers_to_transform matches nothing, or matches
            layers that cannot be adapted. All faults in one message.
    """
    faults: list[str] = []
    layers = _chosen_layers(config, model, faults)
    if config.method != "lora":
        _raise(faults)
        return list(layers or {})
    linears, decoder = linear_layers(model), _decoder(model)
    wanted = _wanted(config, model, linears, decoder, faults)
    known = dict.fromkeys([*linears, *expert_weights(model)], model)
    excluded = _matching(config.exclude_modules, "exclude_modules", known, faults) if config.exclude_modules else set()
    refused = {name: reason for name in wanted if (reason := _refusal(name, model, decoder)) and name not in excluded}
    if refused:
        faults.append("; ".join(f"{name} {reason}" for name, reason in sorted(refused.items())[:5]))
    chosen = [name for name in linears if name in wanted and name not in excluded]
    if layers is not None:
        chosen = [name for name in chosen if any(name.startswith(layer + ".") for layer in layers)]
    if not chosen and not faults:
        faults.append(
            f"target_modules {config.target_modules!r} without exclude_modules {config.exclude_modules!r} leave no "
            "layer to adapt"
        )
    _raise(faults)
    return chosen


def endings(chosen: Iterable[str], model: nn.Module) -> list[str]:
    """Returns the shortest target_modules that name the chosen layers alone: last parts, else full names."""
    chosen = set(chosen)
    last = sorted({name.rpartition(".")[2] for name in chosen})
    matched = {name for name in linear_layers(model) if name.rpartition(".")[2] in last}
    return last if matched == chosen else sorted(chosen)


def _decoder(model: nn.Module) -> str:
    """Returns the name of the text decoder inside the model; "" if the model itself is the decoder."""
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():
        # get_decoder returns the attribute `decoder`, which in ModernBERT decoders is the head
        decoder = model.base_model
    return next((plain_name(name) for name, module in model.named_modules() if module is decoder), "")


def _chosen_layers(config: PreftConfig, model: nn.Module, faults: list[str]) -> dict[str, nn.Module] | None:
    if config.method == "lora" and config.layers_to_transform is None:
        return None
    layers = decoder_layers(model)
    if config.layers_to_transform is None:
        return layers
    names = list(layers)
    assert isinstance(config.layers_to_transform, list)
    outside = [i for i in config.layers_to_transform if i >= len(names)]
    if outside:
        more = f" and {len(outside) - MAX_SHOWN} more" if len(outside) > MAX_SHOWN else ""
        faults.append(
            f"layers_to_transform has {outside[:MAX_SHOWN]}{more}: the decoder layers are 0 to {len(names) - 1}"
        )
    return {names[i]: layers[names[i]] for i in config.layers_to_transform if i < len(names)}


def _wanted(
    config: PreftConfig, model: nn.Module, linears: dict[str, nn.Module], decoder: str, faults: list[str]
) -> set[str]:
    if config.target_modules == "all-linear":
        return {name for name in linears if not _refusal(name, model, decoder)}
    assert config.target_modules is not None
    return _matching(config.target_modules, "target_modules", linears, faults)


def _matching(entries: list[str] | str, field: str, linears: dict[str, nn.Module], faults: list[str]) -> set[str]:
    if isinstance(entries, str):
        matched = {name for name in linears if re.fullmatch(entries, name)}
        if not matched:
            faults.append(
                f"{field} {entries[:200]!r} matches no linear layer: match whole names such as {_some(linears)}"
            )
        return matched
    matched = set()
    for entry in entries:
        hits = {name for name in linears if name == entry or name.endswith("." + entry)}
        if not hits:
            last = sorted({name.rpartition(".")[2] for name in linears})
            close = get_close_matches(entry, last, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the model has {', '.join(last)}"
            faults.append(f"{field} entry {entry[:100]!r} matches no linear layer ({hint})")
        matched |= hits
    return matched


def _refusal(name: str, model: nn.Module, decoder: str) -> str | None:
    """Returns why the layer cannot be adapted, None if it can."""
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        if head is not None and submodule(model, name) is head:
            return "is the output embedding, which sees only the last tokens of a prompt: leave it out"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if name.rpartition(".")[2] in BYPASSED.get(str(model_type), ()):
        return f"is bypassed by {model_type}, which uses its weight directly, so an adapter cannot run: leave it out"
    kind = type(submodule(model, name))
    own_forward = issubclass(kind, nn.Linear) and kind.forward is not nn.Linear.forward
    if own_forward and kind.__module__.startswith("transformers.models.") and kind.__name__ not in STILL_LINEAR:
        return f"is a {kind.__name__}, which does not compute a linear layer: leave it out"
    if decoder and not name.startswith(decoder + "."):
        return (
            f"is outside the text decoder {decoder}, as in a vision tower, where rows are not prompt tokens: "
            f'leave it out, with target_modules such as "{re.escape(decoder)}\\..*_proj" or with exclude_modules'
        )
    return None


def _some(linears: dict[str, nn.Module]) -> str:
    return ", ".join(list(linears)[:2]) or "(there is none)"


def _raise(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise ValueError("PreftConfig does not fit the base model: " + "; ".join(faults[:MAX_SHOWN]) + more)
