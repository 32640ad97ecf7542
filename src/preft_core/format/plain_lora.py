"""Converts between a plain PEFT LoRA and a LoRA-P adapter: same weights, other names, different meaning."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from preft_core.format.adapter import KEY_PREFIX, WEIGHTS_NAME, load_adapter, save_adapter
from preft_core.format.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    AdapterError,
    parse_json,
    read_limited,
)
from preft_core.format.header import read_header
from preft_core.format.names import plain_name
from preft_core.format.staging import staging_in

_COPIED = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "use_rslora")
_IGNORED = {
    *("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("init_lora_weights", "peft_version", "loftq_config", "runtime_config", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "fan_in_fan_out", "ensure_weight_tying"),
}
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "none", "")


def from_lora(lora: str | Path, output: str | Path) -> str:
    """Writes a LoRA-P adapter with the weights of a plain PEFT LoRA; returns its fingerprint.

    The meaning changes: the LoRA was trained to act on every token; LoRA-P acts on prompt tokens only.

    Args:
        lora: a directory with adapter_config.json and adapter_model.safetensors
        output: the directory of the new adapter; created if it does not exist
    Raises:
        AdapterError: not a LoRA, or one with options that LoRA-P does not have. Nothing is written.
        OSError: the files cannot be written.
    """
    return save_adapter(output, *read_lora(lora))


def read_lora(lora: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Returns config and tensors of a LoRA-P adapter with the weights of a plain PEFT LoRA.

    Args:
        lora: a directory with adapter_config.json and adapter_model.safetensors
    Returns: the config, and the tensors by their names in a PreFT file; dtypes and shapes are the LoRA's.
    Raises:
        AdapterError: not a LoRA, or one with options that LoRA-P does not have.
    """
    directory = Path(lora)
    config = parse_json(read_limited(directory / CONFIG_NAME, MAX_CONFIG_BYTES), str(directory / CONFIG_NAME))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{directory}: peft_type is {found!r}: give the directory of a plain PEFT LoRA")
    faults = [
        f"{name} is {str(value)[:60]}"
        for name, value in sorted(config.items())
        if name not in _COPIED and name not in _IGNORED and value not in _NEUTRAL
    ]
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "lora_ga")):
        faults.append(f"init_lora_weights is {config['init_lora_weights']}, which changed the base model's weights")
    read_header(directory / WEIGHTS_NAME)
    tensors = {}
    for stored, tensor in load_file(directory / WEIGHTS_NAME).items():
        name = plain_name(stored)
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if not name.startswith(KEY_PREFIX) or leaf not in ("lora_A", "lora_B"):
            faults.append(f"tensor {name[:100]}")
        tensors[f"{stem}.preft_{leaf[-1]}"] = tensor
    if faults:
        raise AdapterError(f"{directory}: LoRA-P does not support {'; '.join(faults[:20])}")
    values: dict[str, Any] = {name: config[name] for name in _COPIED if config.get(name) is not None}
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    if isinstance(values.get("layers_to_transform"), int):
        values["layers_to_transform"] = (values["layers_to_transform"],)
    kept: dict[str, Any] = {name: config.get(name) for name in ("base_model_name_or_path", "revision", "task_type")}
    return AdapterConfig(method="lora", **values, **kept), tensors


def to_lora(adapter: str | Path, output: str | Path) -> None:
    """Writes a plain PEFT LoRA with the weights of a LoRA-P adapter.

    The meaning changes: a plain LoRA acts on every token.

    Args:
        adapter: the directory of a LoRA-P adapter
        output: the directory of the LoRA; created if it does not exist
    Raises:
        AdapterError: not an adapter, or one of another method than lora. Nothing is written.
        OSError: the files cannot be written.
    """
    source = load_adapter(adapter)
    config = source.config
    if config.method != "lora":
        raise AdapterError(f"{adapter} has method {config.method}: only lora can be converted to a plain LoRA")
    tensors = {
        name.replace(".preft_A", ".lora_A.weight").replace(".preft_B", ".lora_B.weight"): tensor.contiguous()
        for name, tensor in source.tensors.items()
    }
    data = {name: getattr(config, name) for name in _COPIED}
    data |= {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "task_type": config.task_type,
    }
    with staging_in(Path(output)) as staging:
        save_file(tensors, staging / WEIGHTS_NAME, {"format": "pt"})
        (staging / CONFIG_NAME).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(staging / CONFIG_NAME, staging / WEIGHTS_NAME)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(staging / name, Path(output) / name)
