"""Loading an adapter is all or nothing: if its weights are refused, the model is as it was before."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel
from torch import nn

from preft_core.format.adapter import AdapterError
from preft_hf.config import PreftConfig
from preft_hf.forward.hooks import ATTRIBUTE, attachment_of
from preft_hf.layers.linear import PreftLayer
from preft_hf.tuner.attach import take_out
from preft_hf.tuner.loading import CheckedLoading, differences
from preft_hf.tuner.names import unwrapped
from preft_hf.tuner.reading import check_present, loading

_HUB_OPTIONS = {"subfolder", *inspect.signature(hf_hub_download).parameters} - {"repo_id", "filename"}


def undone_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' load_adapter adds the adapter before it reads the weights; if these are refused, it is removed."""

    @functools.wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place = args[0] if args else kwargs.get("peft_model_id")
        if isinstance(place, (str, os.PathLike)):
            check_present(place, (kwargs.get("adapter_kwargs") or {}).get("subfolder") or kwargs.get("subfolder"))
        with _whole_or_not_at_all(self):
            return load(self, *args, **kwargs)

    return load_adapter


def checked_and_undone_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's load_adapter does the same, and loads over an existing adapter without reading the saved config."""

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any):
        check_present(model_id, kwargs.get("subfolder"))
        config = self.peft_config.get(adapter_name)
        if isinstance(config, PreftConfig) and config.saved_fingerprint is None:
            options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
            saved = PreftConfig.from_pretrained(os.fspath(model_id), **options)
            if faults := differences(saved, config):
                raise AdapterError(_over(self, adapter_name, f"{model_id}", faults))
            config.saved_fingerprint = saved.saved_fingerprint
        try:
            with _whole_or_not_at_all(self):
                return load(self, model_id, adapter_name, *args, **kwargs)
        finally:
            if isinstance(config, PreftConfig):
                config.saved_fingerprint = None

    return load_adapter


def made_or_undone(make: Callable[..., Any]) -> Callable[..., Any]:
    """PeftModel.from_pretrained adds the adapter before it reads the weights; if these are refused, it is removed."""

    @functools.wraps(make)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        with _whole_or_not_at_all(model):
            return make(cls, model, *args, **kwargs)

    return from_pretrained


def _over(model: PeftModel, adapter_name: str, place: str, faults: str) -> str:
    """Returns why a saved adapter cannot be loaded over an existing one, or with the config that was given."""
    if adapter_name in attachment_of(_core(model)).awaiting:
        return f"{place} cannot be loaded with this config: {faults}; leave config out"
    return (
        f"{place} cannot be loaded over the adapter {adapter_name!r}: {faults}; load it under another name, or call "
        f"delete_adapter({adapter_name!r}) first"
    )


def _core(model: nn.Module) -> nn.Module:
    """Returns the model that adapters are attached to: inside a PeftModel or a compiled model, or the model itself."""
    return unwrapped(model.get_base_model() if isinstance(model, PeftModel) else model)


@dataclass(frozen=True)
class _Before:
    """The state of a base model before a load: what loading an adapter changes besides adding it."""

    adapters: set[str]
    configs: dict[str, Any] | None
    active: list[tuple[PreftLayer, list[str]]]
    trained: list[tuple[nn.Parameter, bool]]
    loaded: dict[str, bool]

    @classmethod
    def of(cls, base: nn.Module) -> "_Before":
        attachment = base.__dict__.get(ATTRIBUTE)
        layers = attachment.layers if attachment is not None else []
        configs = base.__dict__.get("peft_config")
        return cls(
            adapters=attachment.routing.held() if attachment is not None else set(),
            configs=None if configs is None else dict(configs),
            active=[(layer, list(layer.active_adapters)) for layer in layers],
            trained=[(parameter, parameter.requires_grad) for parameter in base.parameters()],
            loaded={name: base.__dict__[name] for name in ("_hf_peft_config_loaded",) if name in base.__dict__},
        )

    def restore(self, base: nn.Module) -> None:
        """Removes the adapters that were added since, if there are any."""
        attachment = base.__dict__.get(ATTRIBUTE)
        added = attachment.routing.held() - self.adapters if attachment is not None else set()
        if not added:
            return
        for layer, names in self.active:
            layer.set_adapter(names)
        for name in added:
            _delete(base, name)
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)
        if self.configs is None:
            base.__dict__.pop("peft_config", None)
            # an attribute of transformers' class until an adapter is loaded
            base.__dict__.pop("_hf_peft_config_loaded", None)
            base.__dict__.update(self.loaded)


@contextmanager
def borrowed(base: nn.Module) -> Iterator[None]:
    """Removes the adapters that are added inside at the end, so that the base model is as it was."""
    before = _Before.of(base)
    try:
        yield
    finally:
        before.restore(base)


@contextmanager
def _whole_or_not_at_all(model: nn.Module) -> Iterator[None]:
    """Removes the adapters that were added inside if the loading fails."""
    base = _core(model)
    before = _Before.of(base)
    try:
        with loading():
            yield
    except BaseException:
        before.restore(base)
        raise


def _delete(base: nn.Module, adapter_name: str) -> None:
    attachment = base.__dict__[ATTRIBUTE]
    attachment.awaiting.discard(adapter_name)
    for layer in attachment.layers:
        layer.delete_adapter(adapter_name)
    base.__dict__.get("peft_config", {}).pop(adapter_name, None)
    stand_in = base.__dict__.get("_load_pretrained_model")
    if isinstance(stand_in, CheckedLoading):
        stand_in.remove()
    take_out(base, _is_empty)


def _is_empty(layer: PreftLayer) -> bool:
    return not layer.preft_A and not layer.pooled
