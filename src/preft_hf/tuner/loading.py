"""The gate for weights that are loaded into an adapter, through PEFT or through transformers."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from preft_core.format.adapter import (
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterError,
    check_shapes,
    check_tensors,
    fingerprint,
    fingerprint_fault,
)
from preft_hf.config import PreftConfig
from preft_hf.forward.hooks import ATTRIBUTE, attachment_of
from preft_hf.layers.linear import PreftLayer
from preft_hf.tuner.names import plain_name
from preft_hf.tuner.reading import current_load, read_adapter

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
    """Checks a state dict, under the names of the model's modules, against the adapter in the model; then enables it.

    Every way to load an adapter comes through here.

    Raises:
        AdapterError: missing, unexpected or mis-shaped weights, values that are not finite, or weights that are not
            those the config was saved with.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in weights.items():
        module, _, leaf = plain_name(key).removeprefix(KEY_PREFIX).rpartition(".")
        found.setdefault(module, {})[leaf] = tuple(tensor.shape)
    check_shapes(config, found, expected_shapes(model, adapter_name))
    check_tensors(config, weights)
    check_fingerprint(config, weights)
    attachment_of(_base_of(model)).awaiting.discard(adapter_name)


def check_fingerprint(config: PreftConfig, weights: Mapping[str, Tensor]) -> None:
    """Checks weights, under their names in the file, against the fingerprint in their config. Checks once.

    Raises:
        AdapterError: config and weights were not saved together.
    """
    saved, load = config.saved_fingerprint, current_load()
    if saved is not None and (load is None or load.fingerprint != saved):
        actual = fingerprint(config, weights)
        if actual != saved:
            raise AdapterError(fingerprint_fault(actual, saved))
    # later checkpoints of the same adapter have other weights
    config.saved_fingerprint = None


def differences(saved: PreftConfig | AdapterConfig, config: PreftConfig) -> str:
    """Returns where a saved adapter computes another function than a config describes; "" if nowhere."""
    return "; ".join(
        f"{name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here"
        for name in ("method", "r", "lora_alpha", "use_rslora")
        if getattr(saved, name) != getattr(config, name)
    )


class CheckedLoading:
    """Replaces a model's `_load_pretrained_model` for one call: checks an adapter's weights, then loads them.

    transformers' load_adapter itself only logs missing and unexpected weights.
    """

    def __init__(self, model: nn.Module, config: PreftConfig, adapter_name: str):
        self.model = model
        self.config = config
        self.adapter_name = adapter_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        weights = kwargs.get("state_dict")
        if weights is None:
            weights = self._read(kwargs.get("checkpoint_files") or [])
        # before names are changed
        check_fingerprint(self.config, weights)
        renamed = self._renamed(weights, kwargs["load_config"].weight_mapping or [])
        check_weights(self.model, self.config, self.adapter_name, renamed)
        # under the names that were checked, without reading the file again
        kwargs["state_dict"], kwargs["checkpoint_files"] = self._in_full(renamed), []
        kwargs["load_config"] = replace(kwargs["load_config"], weight_mapping=[])
        # the class's own method
        return getattr(type(self.model), "_load_pretrained_model")(*args, **kwargs)  # noqa: B009

    def place(self) -> None:
        """Replaces the model's method."""
        self.model.__dict__["_load_pretrained_model"] = self

    def remove(self) -> None:
        """Restores the model's method."""
        self.model.__dict__.pop("_load_pretrained_model", None)

    def _read(self, files: list[str]) -> dict[str, Tensor]:
        if len(files) != 1 or Path(files[0]).name != WEIGHTS_NAME:
            raise AdapterError(
                f"the adapter's weights are {', '.join(files) or 'missing'}: PreFT adapters are one {WEIGHTS_NAME}, "
                "never a pickle"
            )
        directory = Path(files[0]).parent
        adapter = read_adapter(directory)
        if faults := differences(adapter.config, self.config):
            raise AdapterError(f"{directory} cannot be loaded with this peft_config: {faults}; leave peft_config out")
        return adapter.tensors

    def _renamed(self, weights: Mapping[str, Tensor], mapping: list[Any]) -> dict[str, Tensor]:
        """Returns the weights under the names that transformers loads them by, without the adapter's name."""
        # a copy, because transforms record that they were used
        mapping = copy.deepcopy(mapping)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        ending = f".{self.adapter_name}"
        return {
            rename_source_key(name, renamings, converters)[0].removesuffix(ending): tensor
            for name, tensor in weights.items()
        }

    def _in_full(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights under their parameters' names in the model, wrappers' parts included."""
        paths = {plain_name(path): path for path, _ in self.model.named_modules()}
        full = {}
        for name, tensor in weights.items():
            path, _, leaf = plain_name(name).removeprefix(KEY_PREFIX).rpartition(".")
            full[f"{paths[path]}.{leaf}.{self.adapter_name}"] = tensor
        return full


def _base_of(model: nn.Module) -> nn.Module:
    """Returns the model that the adapter was attached to, inside a PeftModel or the model itself."""
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            return module
    return model
