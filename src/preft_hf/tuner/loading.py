"""Weights that arrive for an adapter, through PEFT or through transformers, checked before they are used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.format.adapter import WEIGHTS_NAME, AdapterError, check_shapes, fingerprint, load_adapter
from preft_hf.config import PreftConfig
from preft_hf.forward.hooks import attachment_of
from preft_hf.layers.linear import PreftLayer
from preft_hf.tuner.names import plain_name

KEY_PREFIX = "base_model.model."


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, PreftLayer]:
    """Returns the layers that hold the adapter, by module path in the base model, without wrappers' names."""
    return {
        plain_name(name).removeprefix(KEY_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, PreftLayer) and adapter_name in module.preft_A
    }


def expected_shapes(model: nn.Module, adapter_name: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of the adapter's weights in the model: module path -> leaf -> shape."""
    return {
        path: {
            leaf: tuple(getattr(layer, leaf)[adapter_name].shape)
            for leaf in layer.adapter_layer_names
            if adapter_name in getattr(layer, leaf)
        }
        for path, layer in layers_with(model, adapter_name).items()
    }


def check_weights(model: nn.Module, config: PreftConfig, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
    """Checks a state dict in checkpoint names against the adapter in the model; then lets the adapter run.

    Raises:
        AdapterError: missing, unexpected or mis-shaped weights, values that are not finite, or weights that are not
            those the config was saved with.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in weights.items():
        module, _, leaf = key.removeprefix(KEY_PREFIX).rpartition(".")
        found.setdefault(module, {})[leaf] = tuple(tensor.shape)
    check_shapes(config, found, expected_shapes(model, adapter_name))
    infinite = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise AdapterError(f"{len(infinite)} weights hold NaN or infinite values, the first is {infinite[0]}")
    if config.saved_fingerprint is not None:
        actual = fingerprint(config, weights)
        if actual != config.saved_fingerprint:
            raise AdapterError(
                f"the weights have fingerprint {actual} and adapter_config.json says {config.saved_fingerprint}: the "
                "save was interrupted or a file was changed; save or download the adapter again"
            )
        # Checked once: later checkpoints of the same adapter have other weights.
        config.saved_fingerprint = None
    attachment_of(_base_of(model)).awaiting.discard(adapter_name)


def expect_weights(model: nn.Module, config: PreftConfig, adapter_name: str) -> None:
    """Checks the weights of an adapter that transformers makes from a saved config.

    transformers' load_adapter only logs missing and unexpected weights, so its next reading of a checkpoint into this
    model is checked here first.
    """
    model.__dict__["_load_pretrained_model"] = CheckedLoading(model, config, adapter_name)


class CheckedLoading:
    """Stands in, once, for a model's `_load_pretrained_model`: checks an adapter's files, then reads them."""

    def __init__(self, model: nn.Module, config: PreftConfig, adapter_name: str):
        self.model = model
        self.config = config
        self.adapter_name = adapter_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        del self.model.__dict__["_load_pretrained_model"]
        files, state_dict = kwargs.get("checkpoint_files"), kwargs.get("state_dict")
        if state_dict is None:
            state_dict = self._read(files or [])
        check_weights(self.model, self.config, self.adapter_name, state_dict)
        return getattr(type(self.model), "_load_pretrained_model")(*args, **kwargs)  # noqa: B009

    def _read(self, files: list[str]) -> dict[str, Tensor]:
        if len(files) != 1 or Path(files[0]).name != WEIGHTS_NAME:
            raise AdapterError(
                f"the adapter's weights are {', '.join(files) or 'missing'}: PreFT adapters are one {WEIGHTS_NAME}, "
                "never a pickle"
            )
        return load_adapter(Path(files[0]).parent).tensors


def _base_of(model: nn.Module) -> nn.Module:
    """Returns the model that the adapter was attached to, inside a PeftModel or the model itself."""
    for module in model.modules():
        if "_preft_attachment" in module.__dict__:
            return module
    return model
