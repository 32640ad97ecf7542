"""The adapter on disk: config and weights, checked when read, written atomically, identified by a fingerprint."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from preft_core.format.config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterError,
    Facts,
    config_faults,
    parse_config,
    read_config,
)
from preft_core.format.header import TensorInfo, open_weights, raise_faults, read_header, read_tensors
from preft_core.format.names import plain_name
from preft_core.format.staging import publish_files, staging_in, write_config
from preft_core.orthonormal import orthonormal_rows

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


@dataclass(frozen=True)
class Adapter:
    """A checked adapter in host memory.

    Attributes:
        config: as saved
        tensors: by name, `base_model.model.<module path>.<leaf>`, without wrappers' parts such as _orig_mod; float32,
            float16 or bfloat16, on the CPU
        fingerprint: "sha256:..." of config and tensors, see `fingerprint`
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    fingerprint: str

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors by module path and leaf name (preft_A, ...). They are not copied."""
        return _by_module(self.tensors)

    @property
    def num_parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def check_header(config: Facts, header: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Checks names and shapes of an adapter's tensors against its config; returns them by module path and leaf name.

    Args:
        config: method and r are used
        header: tensors by name in the file, as `read_header` returns them
    Raises:
        AdapterError: unknown names, missing or unexpected leaves, shapes that do not match r or each other. All faults
            in one message.
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
                f"{path}: missing {', '.join(missing) or 'nothing'}, unexpected {', '.join(surplus) or 'nothing'}"
            )
        elif fault := _shape_fault(config, {leaf: info.shape for leaf, info in leaves.items()}):
            faults.append(f"{path}: {fault}")
    if not modules and not faults:
        faults.append("there are no tensors")
    raise_faults(f"the weights do not match method {config.method} with r = {config.r}", faults)
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

    Args:
        config: method is used, in the message
        found, expected: module path -> leaf name -> shape
    Raises:
        AdapterError: missing weights, unexpected weights, wrong shapes. All faults in one message.
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
    raise_faults(f"the {config.method} adapter's weights do not match this base model and config", faults)


def fingerprint(config: Facts, tensors: Mapping[str, Tensor]) -> str:
    """Returns "sha256:" + the hash of what the adapter computes.

        sha256(JSON of format_version, lora_alpha, method, r, use_rslora; then for each tensor, sorted by name:
               JSON of [name, dtype, shape], then its little-endian bytes)

    Independent of the order in the file, and of config fields that do not change the function.

    Args:
        config, tensors: the tensors by name in the file, on any device
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

    Config, file header, names and shapes are checked before a tensor is allocated; values and fingerprint afterwards.

    Args:
        directory: of adapter_config.json and adapter_model.safetensors
        check_values: check that all values are finite and, for loreft, that the rows of R are linearly independent
    Raises:
        AdapterError: a file that the format does not allow, a pickle, or a fingerprint that differs from the config's.
    """
    directory = Path(directory)
    weights = directory / WEIGHTS_NAME
    if not weights.exists() and (directory / PICKLE_NAME).exists():
        raise AdapterError(
            f"{directory / PICKLE_NAME} is a pickle, which can run code when loaded: PreFT adapters are "
            f"{WEIGHTS_NAME} only; save the adapter again with preft-hf"
        )
    config = read_config(directory)
    with open_weights(weights) as (header, reader):
        check_header(config, header)
        # not a mapped file: a later write to it would change the loaded adapter
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
    faults = [f"{name} contains NaN or infinite values" for name, t in tensors.items() if not torch.isfinite(t).all()]
    if config.method == "loreft" and not faults:
        for name, tensor in tensors.items():
            if name.endswith(".preft_R"):
                rows = orthonormal_rows(tensor.double())
                # a dependent row has no component left along its own orthonormal direction
                own = (rows * tensor.double()).sum(-1).abs() / tensor.double().norm(dim=-1).clamp(min=1e-300)
                if own.min() < 1e-6:
                    faults.append(f"{name} has linearly dependent rows")
    raise_faults("the weights cannot be used", faults)


def save_adapter(directory: str | Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> str:
    """Writes an adapter atomically and returns its fingerprint. A failed save leaves existing files unchanged.

    Args:
        directory: created if it does not exist
        config: its fingerprint is ignored and computed anew
        tensors: by name in the file, float32, float16 or bfloat16, on any device
    Raises:
        AdapterError: config or tensors that `load_adapter` would refuse. Nothing is written.
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


def _by_module(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        path, _, leaf = plain_name(name).removeprefix(KEY_PREFIX).rpartition(".")
        modules.setdefault(path, {})[leaf] = value
    return modules
