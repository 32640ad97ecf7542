"""The adapter on disk: config and weights, read with every check, written in one step, told apart by a fingerprint."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from preft_core.format.config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    AdapterConfig,
    AdapterError,
    config_faults,
    parse_config,
    read_config,
)
from preft_core.format.header import TensorInfo, open_weights, raise_faults, read_header, read_tensors
from preft_core.format.names import plain_name
from preft_core.format.staging import staging_in
from preft_core.orthonormal import orthonormal_rows

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
KEY_PREFIX = "base_model.model."
METHOD_LEAVES = {
    "lora": ("preft_A", "preft_B"),
    "direft": ("preft_A", "preft_B", "preft_bias"),
    "loreft": ("preft_A", "preft_R", "preft_bias"),
}

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "METHOD_LEAVES",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "TensorInfo",
    "check_header",
    "check_shapes",
    "check_tensors",
    "config_faults",
    "fingerprint",
    "fingerprint_fault",
    "load_adapter",
    "parse_config",
    "publish_files",
    "read_config",
    "read_header",
    "save_adapter",
]

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Module path -> leaf name -> shape."""


class Facts(Protocol):
    """The facts of a config that change what an adapter computes."""

    @property
    def method(self) -> str: ...
    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float | None: ...
    @property
    def use_rslora(self) -> bool: ...


@dataclass(frozen=True)
class Adapter:
    """A checked adapter in host memory.

    Attributes:
        tensors: by name, `base_model.model.<module path>.<leaf>`, without wrappers' parts such as _orig_mod
        fingerprint: of config and tensors
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    fingerprint: str

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors by module path and leaf name."""
        return _by_module(self.tensors)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_header(config: Facts, header: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Returns the tensors by module path and leaf name, having checked names and shapes against the config.

    Raises:
        AdapterError: all faults: foreign names, missing or surplus leaves, shapes that are not of rank r or disagree.
    """
    faults = [
        f"tensor name {name[:200]!r} does not have the form {KEY_PREFIX}<module path>.preft_..."
        for name in header
        if not _is_name(name)
    ]
    plain = Counter(map(plain_name, header))
    faults += [f"tensor name {name[:200]!r} stands {count} times" for name, count in plain.items() if count > 1]
    modules = _by_module({name: info for name, info in header.items() if _is_name(name)})
    wanted = METHOD_LEAVES[config.method]
    for path, leaves in modules.items():
        missing = [leaf for leaf in wanted if leaf not in leaves]
        surplus = sorted(leaves.keys() - set(wanted))
        if missing or surplus:
            faults.append(
                f"{path} has no {', '.join(missing) or 'fault'}, and {', '.join(surplus) or 'nothing'} too much"
            )
        elif fault := _shape_fault(config, {leaf: info.shape for leaf, info in leaves.items()}):
            faults.append(f"{path}: {fault}")
    if not modules and not faults:
        faults.append("there is no tensor in it")
    raise_faults(f"the weights do not fit method {config.method} with r = {config.r}", faults)
    return modules


def _is_name(name: str) -> bool:
    path, _, leaf = name.removeprefix(KEY_PREFIX).rpartition(".")
    return name.startswith(KEY_PREFIX) and leaf.startswith("preft_") and all(path.split(".")) and len(name) <= 1024


def _shape_fault(config: Facts, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    a, b, bias, rotation = (shapes.get(leaf) for leaf in ("preft_A", "preft_B", "preft_bias", "preft_R"))
    assert a is not None
    right = len(a) == 2 and a[0] == config.r and a[1] > 0
    right = right and (b is None or (len(b) == 2 and b[0] > 0 and b[1] == config.r))
    right = right and (config.method == "lora" or bias == (config.r,))
    right = right and (config.method != "direft" or (b is not None and b[0] == a[1]))
    right = right and (config.method != "loreft" or (rotation == a and a[0] <= a[1]))
    return None if right else ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items())


def check_shapes(config: Facts, found: Shapes, expected: Shapes) -> None:
    """Checks an adapter's shapes against those that a base model expects.

    Raises:
        AdapterError: missing, unexpected and mis-shaped weights, each kind named, in one message.
    """
    have = {(path, leaf): shape for path, leaves in found.items() for leaf, shape in leaves.items()}
    want = {(path, leaf): shape for path, leaves in expected.items() for leaf, shape in leaves.items()}
    faults = [f"missing {path}.{leaf}" for path, leaf in want if (path, leaf) not in have]
    faults += [f"unexpected {path}.{leaf}" for path, leaf in have if (path, leaf) not in want]
    faults += [
        f"{path}.{leaf} has shape {list(have[path, leaf])} and the model expects {list(want[path, leaf])}"
        for path, leaf in have
        if (path, leaf) in want and tuple(have[path, leaf]) != tuple(want[path, leaf])
    ]
    raise_faults(f"the {config.method} adapter's weights do not fit this base model and config", faults)


def fingerprint(config: Facts, tensors: Mapping[str, Tensor]) -> str:
    """Returns "sha256:" and the hash of what the adapter computes: the facts of its config and its tensors.

        sha256(JSON of the facts, then for each tensor by name: JSON of [name, dtype, shape], its little-endian bytes)

    It does not depend on the order in the file, on the device, or on fields that do not change the function.
    """
    facts = {
        "format_version": FORMAT_VERSION,
        "lora_alpha": None if config.lora_alpha is None else float(config.lora_alpha),
        "method": config.method,
        "r": config.r,
        "use_rslora": config.use_rslora,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        label = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(label).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_fault(actual: str, saved: str | None) -> str:
    """Returns the message for an adapter whose fingerprint is not its config's."""
    edited = "method, r, lora_alpha or use_rslora was edited, the weights were changed, or the save was interrupted"
    remedy = "save or download the adapter again, or, if you edited it on purpose, set its fingerprint to null"
    return f"the fingerprint is {actual} and {CONFIG_NAME} says {saved}: {edited}; {remedy}"


def load_adapter(directory: str | Path, *, check_values: bool = True) -> Adapter:
    """Returns the adapter in a directory, on the CPU.

    Config, file header, names and shapes are checked before a tensor is allocated; then the values and the
    fingerprint.

    Args:
        check_values: look for values that are not finite and, for loreft, dependent rows of R
    Raises:
        AdapterError: anything the format does not allow, a pickle, or a fingerprint that is not the config's.
    """
    directory = Path(directory)
    weights = directory / WEIGHTS_NAME
    if not weights.exists() and (directory / PICKLE_NAME).exists():
        raise AdapterError(
            f"{directory / PICKLE_NAME} is a pickle, which can run code when it is read: PreFT adapters are "
            f"{WEIGHTS_NAME} only; ask whoever made the adapter to save it again"
        )
    config = read_config(directory)
    with open_weights(weights) as (header, reader):
        check_header(config, header)
        # a mapped file would change a loaded adapter when somebody writes into it
        read = read_tensors(header, reader)
    tensors = {name: read[name] for name in sorted(read)}
    if check_values:
        check_tensors(config, tensors)
    actual = fingerprint(config, tensors)
    if config.fingerprint not in (None, actual):
        raise AdapterError(f"{directory}: {fingerprint_fault(actual, config.fingerprint)}")
    return Adapter(config, {plain_name(name): tensor for name, tensor in tensors.items()}, actual)


def check_tensors(config: Facts, tensors: Mapping[str, Tensor]) -> None:
    """Raises an AdapterError for values that are not finite and, for loreft, for dependent rows of R."""
    faults = [f"{name} holds NaN or infinite values" for name, t in tensors.items() if not torch.isfinite(t).all()]
    if config.method == "loreft" and not faults:
        for name, tensor in tensors.items():
            if name.endswith(".preft_R"):
                rows = orthonormal_rows(tensor.double())
                # a dependent row has nothing left in the direction that is its own
                own = (rows * tensor.double()).sum(-1).abs() / tensor.double().norm(dim=-1).clamp(min=1e-300)
                if own.min() < 1e-6:
                    faults.append(f"{name} has rows that depend on each other")
    raise_faults("the weights cannot be used", faults)


def save_adapter(directory: str | Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> str:
    """Writes an adapter in one step and returns its fingerprint. A failed save leaves what was there.

    Raises:
        AdapterError: config or tensors that load_adapter would refuse; nothing is written.
        OSError: the files cannot be written.
    """
    mark = fingerprint(config, tensors)
    data = {field.name: getattr(config, field.name) for field in fields(config)} | {"fingerprint": mark}
    with staging_in(Path(directory)) as staging:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, staging / WEIGHTS_NAME, {"format": "pt"})
        write_config(staging, data)
        load_adapter(staging)
        publish_files(staging, Path(directory))
    return mark


def write_config(directory: Path, data: Mapping[str, Any]) -> None:
    """Writes CONFIG_NAME into a directory that nobody reads yet."""
    (directory / CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish_files(staging: Path, directory: Path) -> None:
    """Moves config and then weights from a staging directory on the same file system into their place.

    The config has to carry its fingerprint. Each file changes in one step. Between the two steps, a reader finds the
    new config beside the old weights or none, which its fingerprint refuses; never a mixture that passes for an
    adapter. Both may be read by those whom the umask lets.
    """
    # safetensors 0.8 makes files that their owner alone may read, and a server is often another user
    shutil.copymode(staging / CONFIG_NAME, staging / WEIGHTS_NAME)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (staging / name).open("rb+") as file:
            os.fsync(file.fileno())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        os.replace(staging / name, directory / name)
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _by_module(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        path, _, leaf = plain_name(name).removeprefix(KEY_PREFIX).rpartition(".")
        modules.setdefault(path, {})[leaf] = value
    return modules
