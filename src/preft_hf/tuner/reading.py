"""Reads adapter files for PEFT and transformers with the checks of preft_core, before anything else reads them."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from preft_core.format.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, AdapterError, load_adapter
from preft_core.format.config import MAX_CONFIG_BYTES, parse_config, parse_json, read_limited
from preft_hf.config import PreftType

_LOAD: ContextVar["Load | None"] = ContextVar("preft_load", default=None)


@dataclass
class Load:
    """One load of an adapter in progress.

    Attributes:
        fingerprint: of the adapter whose file was read and checked; None before that
    """

    fingerprint: str | None = None


def current_load() -> Load | None:
    """Returns the load in progress. Adapters that are made during one get saved weights next."""
    return _LOAD.get()


@contextmanager
def loading() -> Iterator[Load]:
    """Starts a load, or joins the one in progress."""
    load = _LOAD.get() or Load()
    token = _LOAD.set(load)
    try:
        yield load
    finally:
        _LOAD.reset(token)


def read_adapter(directory: Path) -> Adapter:
    """Returns the adapter in a directory, checked.

    Raises:
        AdapterError: as preft_core's load_adapter, always with the directory.
    """
    with _named(directory):
        adapter = load_adapter(directory)
    load = current_load()
    if load is not None:
        load.fingerprint = adapter.fingerprint
    return adapter


def check_present(place: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Checks that a PreFT adapter in a local directory has its weights file; PEFT would look for it on the Hub.

    Raises:
        AdapterError: it has none.
    """
    directory = Path(place, subfolder or "")
    if is_preft(directory) and not (directory / WEIGHTS_NAME).is_file():
        read_adapter(directory)


def checked_config(read: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT accepts any JSON as a config, such as a list or a wrong type, and drops fields that it does not know."""

    @functools.wraps(read)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> Any:
        try:
            data = parse_json(read_limited(Path(path_json_file), MAX_CONFIG_BYTES), str(path_json_file))
        except AdapterError as error:
            return _of_another_method(functools.partial(read, cls, path_json_file, **kwargs), error)
        # a field of PREFT alone
        untyped = isinstance(data, Mapping) and "peft_type" not in data and "format_version" in data
        if untyped or not isinstance(data, Mapping) or data.get("peft_type") == PreftType.PREFT.value:
            with _named(Path(path_json_file).parent):
                parse_config(data)
        return read(cls, path_json_file, **kwargs)

    return from_json_file


def _of_another_method(read: Callable[[], Any], error: AdapterError) -> Any:
    """Returns a config that PEFT reads and preft_core does not, if it names another type; else raises the error."""
    try:
        data = read()
    except (ValueError, TypeError, OSError, RecursionError):
        raise error from None
    if isinstance(data, Mapping) and data.get("peft_type") not in (None, PreftType.PREFT.value):
        return data
    raise error


def checked_weights(read: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT reads weights without their config, and a damaged file raises the bare errors of safetensors."""

    @functools.wraps(read)
    def safe_load_file(filename: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Tensor]:
        directory = Path(filename).parent
        if Path(filename).name != WEIGHTS_NAME or not is_preft(directory):
            return read(filename, device=device)
        return {name: tensor.to(device) for name, tensor in read_adapter(directory).tensors.items()}

    return safe_load_file


def is_preft(directory: Path) -> bool:
    """Returns True for a local directory whose config names the type PREFT."""
    file = directory / CONFIG_NAME
    if not file.is_file():
        return False
    try:
        data = parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file))
    except AdapterError:
        return False
    return isinstance(data, Mapping) and data.get("peft_type") == PreftType.PREFT.value


@contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Adds the directory to errors that do not name it."""
    try:
        yield
    except AdapterError as error:
        if str(directory) in str(error):
            raise
        raise AdapterError(f"{directory}: {error}") from error
