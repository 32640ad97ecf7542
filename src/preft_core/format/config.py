"""adapter_config.json: its fields, their allowed values, and checks that report all faults at once."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from preft_core.format.pattern import is_tame

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 4096
METHODS = ("lora", "direft", "loreft")


class AdapterError(ValueError):
    """An adapter that cannot be used: missing, malformed, or not matching the model."""


class HubError(AdapterError):
    """The Hub, or the connection to it, failed: trying again later may help."""


class Facts(Protocol):
    """The config fields that change what an adapter computes."""

    @property
    def method(self) -> str: ...
    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float | None: ...
    @property
    def use_rslora(self) -> bool: ...


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a saved adapter_config.json. docs/explain/format.md has the meaning of each field."""

    method: str
    r: int
    lora_alpha: float | None
    peft_type: str = "PREFT"
    format_version: int = FORMAT_VERSION
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    use_rslora: bool = False
    init_weights: bool = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    peft_version: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    fingerprint: str | None = None

    @property
    def scaling(self) -> float:
        """The factor s of the update: alpha / r, alpha / sqrt(r) with use_rslora, 1.0 for loreft."""
        if self.lora_alpha is None:
            return 1.0
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def config_faults(values: Mapping[str, object], *, resolved: bool = True) -> list[str]:
    """Returns the faults in the values of known fields, one sentence each; an empty list if there are none.

    Args:
        values: some or all fields of AdapterConfig, as Python objects or as read from JSON
        resolved: True for a saved config, in which defaults that depend on other fields are filled in
    """
    faults = []
    for name, (allowed, is_allowed) in _RULES.items():
        if name in values and not is_allowed(values[name]):
            faults.append(f"{name} is {_shown(values[name])}: allowed: {allowed}")
    version = values.get("format_version", FORMAT_VERSION)
    if _is_int(version) and version > FORMAT_VERSION:  # type: ignore[operator]
        faults.append(f"format_version is {version}: this preft-hf reads up to {FORMAT_VERSION}; upgrade preft-hf")
    return faults + _faults_between(values, resolved)


def _faults_between(values: Mapping[str, object], resolved: bool) -> list[str]:
    faults = []
    method, alpha = values.get("method"), values.get("lora_alpha")
    if method == "loreft":
        if alpha is not None:
            faults.append(f"lora_alpha is {_shown(alpha)} with method loreft, which has no scaling: omit it")
        if values.get("use_rslora") is True:
            faults.append("use_rslora is True with method loreft, which has no scaling: omit it")
        if _is_number(values.get("lora_dropout")) and values["lora_dropout"] != 0:
            faults.append("lora_dropout is not 0 with method loreft, which has no dropout: omit it")
    elif resolved and "lora_alpha" in values and alpha is None:
        faults.append(f"lora_alpha is null with method {method}: a saved config has a number")
    if method in ("direft", "loreft"):
        targets = values.get("target_modules")
        if targets not in (None, "all-linear") or values.get("exclude_modules") is not None:
            faults.append(
                f"target_modules or exclude_modules is given with method {method}, which adapts decoder layers: "
                "choose them with layers_to_transform"
            )
    elif resolved and "target_modules" in values and values["target_modules"] is None:
        faults.append("target_modules is null with method lora: a saved config names the adapted layers")
    return faults


def parse_config(data: object) -> AdapterConfig:
    """Returns the config in a decoded JSON object.

    Args:
        data: of adapter_config.json
    Raises:
        AdapterError: missing, unknown or wrong fields. All faults in one message.
    """
    if not isinstance(data, Mapping):
        raise AdapterError(f"{CONFIG_NAME} contains {_shown(data)}: expected a JSON object")
    known = [field.name for field in fields(AdapterConfig)]
    if data.get("peft_type") == "LORA":
        raise AdapterError(
            f"{CONFIG_NAME}: peft_type is 'LORA', a plain LoRA, and a PreFT adapter has 'PREFT': make one of it "
            "with `preft distill` or `preft convert`"
        )
    faults = []
    if data.get("peft_type") != "PREFT":
        faults.append(f"peft_type is {_shown(data.get('peft_type'))}: a PreFT adapter has 'PREFT'")
    for name in sorted(str(key) for key in data if key not in known):
        close = get_close_matches(name, known, n=1)
        hint = f", did you mean {close[0]!r}" if close else ""
        faults.append(f"unknown field {name[:60]!r}{hint}: upgrade preft-hf if a newer version wrote it")
    faults += [f"{name} is missing" for name in ("method", "r", "lora_alpha", "format_version") if name not in data]
    faults += config_faults({name: data[name] for name in known if name in data})
    if faults:
        raise AdapterError(f"{CONFIG_NAME}: " + "; ".join(faults))
    values: dict[str, Any] = {name: data[name] for name in known if name in data}
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return AdapterConfig(**values)


def read_config(path: str | Path) -> AdapterConfig:
    """Returns the config of a saved adapter.

    Args:
        path: of an adapter_config.json, or of the directory that contains it
    Raises:
        AdapterError: a file that is missing, larger than 1 MiB, not strict JSON, or not a config.
    """
    file = Path(path)
    file = file / CONFIG_NAME if file.is_dir() else file
    return parse_config(parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file)))


def read_limited(file: Path, max_bytes: int) -> bytes:
    """Returns a file's bytes. Raises AdapterError if it cannot be read or is longer than max_bytes."""
    try:
        with file.open("rb") as reader:
            data = reader.read(max_bytes + 1)
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror}; give the directory of a saved adapter"
        ) from error
    if len(data) > max_bytes:
        raise AdapterError(f"{file} has more than {max_bytes} bytes, the maximum")
    return data


def parse_json(data: bytes, name: str) -> object:
    """Returns decoded strict JSON: UTF-8, no duplicate keys, no NaN or Infinity.

    Args:
        name: of the file, for the error
    Raises:
        AdapterError: anything else.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{name} is not JSON: {error}") from error
    except ValueError as error:
        # a number with more digits than Python converts, a duplicate key, a constant
        raise AdapterError(f"{name} is not strict JSON: {error}") from error


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= 4096)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_names(value: object) -> bool:
    if isinstance(value, (list, tuple, set)):
        return 0 < len(value) <= 100_000 and all(isinstance(v, str) and 0 < len(v) <= 1024 for v in value)
    return value is None or (isinstance(value, str) and 0 < len(value) <= 4096 and _is_pattern(value))


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return is_tame(value)


def _is_indices(value: object) -> bool:
    indices = value if isinstance(value, (list, tuple, set)) else [value]
    return value is None or (0 < len(indices) <= 100_000 and all(_is_int(v) and 0 <= v < 100_000 for v in indices))  # type: ignore[operator]


def _is_fingerprint(value: object) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{64}", value) is not None)


_NAMES = "a non-empty list of names, a regular expression without repeats inside repeats, or null"
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "method": ("lora, direft or loreft", lambda v: isinstance(v, str) and v in METHODS),
    "r": (f"an integer from 1 to {MAX_RANK}", lambda v: _is_int(v) and 1 <= v <= MAX_RANK),
    "lora_alpha": ("a number above 0, or null", lambda v: v is None or (_is_number(v) and v > 0)),
    "format_version": ("an integer, 1 or more", lambda v: _is_int(v) and v >= 1),
    "lora_dropout": ("a number p with 0 <= p < 1", lambda v: _is_number(v) and 0 <= v < 1),
    "target_modules": (_NAMES, _is_names),
    "exclude_modules": (_NAMES, _is_names),
    "layers_to_transform": ("a non-empty list of layer indices from 0, or null", _is_indices),
    "use_rslora": ("true or false", _is_bool),
    "init_weights": ("true or false", _is_bool),
    "task_type": ("CAUSAL_LM or null", lambda v: v is None or (isinstance(v, str) and v == "CAUSAL_LM")),
    "base_model_name_or_path": ("a string of up to 4096 characters, or null", _is_text),
    "revision": ("a string of up to 4096 characters, or null", _is_text),
    "inference_mode": ("true or false", _is_bool),
    "peft_version": ("a string of up to 4096 characters, or null", _is_text),
    "auto_mapping": ("an object, or null", lambda v: v is None or isinstance(v, Mapping)),
    "fingerprint": ("sha256: and 64 hexadecimal digits, or null", _is_fingerprint),
}
