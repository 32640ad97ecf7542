"""Adapters made for weights that are on their way: if these do not arrive, the model is as it was before."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel
from torch import nn

from preft_core.format.adapter import AdapterError
from preft_hf.config import PreftConfig
from preft_hf.forward.hooks import ATTRIBUTE
from preft_hf.layers.linear import PreftLayer
from preft_hf.tuner.attach import take_out
from preft_hf.tuner.loading import CheckedLoading

_WEIGHTS_FOLLOW: ContextVar[bool] = ContextVar("preft_weights_follow", default=False)
_HUB_OPTIONS = {"subfolder", *inspect.signature(hf_hub_download).parameters} - {"repo_id", "filename"}


def weights_follow() -> bool:
    """Returns True where an adapter is made from a saved config to load its weights next, not to train it anew."""
    return _WEIGHTS_FOLLOW.get()


@contextmanager
def following(follow: bool = True) -> Iterator[None]:
    """Says whether weights follow for the adapters that are made inside."""
    token = _WEIGHTS_FOLLOW.set(follow)
    try:
        yield
    finally:
        _WEIGHTS_FOLLOW.reset(token)


def undone_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a method that loads an adapter into the model it is called on, or leaves the model as it was."""

    @functools.wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _whole_or_not_at_all(self):
            return load(self, *args, **kwargs)

    load_adapter.__preft_original__ = load  # type: ignore[attr-defined]
    return load_adapter


def checked_and_undone_on_failure(load: Callable[..., Any]) -> Callable[..., Any]:
    """Returns PeftModel.load_adapter, which also loads over an adapter that is there and then reads no config."""

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any):
        config = self.peft_config.get(adapter_name)
        if isinstance(config, PreftConfig) and config.saved_fingerprint is None:
            options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
            config.saved_fingerprint = _fingerprint_of_same(config, os.fspath(model_id), adapter_name, options)
        try:
            with _whole_or_not_at_all(self):
                return load(self, model_id, adapter_name, *args, **kwargs)
        finally:
            if isinstance(config, PreftConfig):
                config.saved_fingerprint = None

    load_adapter.__preft_original__ = load  # type: ignore[attr-defined]
    return load_adapter


def made_or_undone(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of PeftModel.from_pretrained, that makes an adapter and loads its weights, or neither."""

    @functools.wraps(make)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        with _whole_or_not_at_all(model):
            return make(cls, model, *args, **kwargs)

    from_pretrained.__preft_original__ = make  # type: ignore[attr-defined]
    return from_pretrained


def _fingerprint_of_same(config: PreftConfig, place: str, adapter_name: str, options: dict[str, Any]) -> str | None:
    """Returns the fingerprint of a saved adapter, whose weights the adapter in place can take over.

    Raises:
        AdapterError: it computes another function of its weights.
    """
    saved = PreftConfig.from_pretrained(place, **options)
    faults = [
        f"{name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here"
        for name in ("method", "r", "lora_alpha", "use_rslora")
        if getattr(saved, name) != getattr(config, name)
    ]
    if faults:
        raise AdapterError(
            f"{place} cannot be loaded over the adapter {adapter_name!r}: {'; '.join(faults)}; load it under another "
            f"name, or call delete_adapter({adapter_name!r}) first"
        )
    return saved.saved_fingerprint


@dataclass(frozen=True)
class _Before:
    """What loading an adapter changes in a base model besides adding the adapter, as it was before."""

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
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    before = _Before.of(base)
    try:
        with following():
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
    if isinstance(base.__dict__.get("_load_pretrained_model"), CheckedLoading):
        del base.__dict__["_load_pretrained_model"]
    take_out(base, _is_empty)


def _is_empty(layer: PreftLayer) -> bool:
    return not layer.preft_A and not layer.pooled
