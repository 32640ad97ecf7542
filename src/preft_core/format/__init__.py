"""The adapter on disk: config, safetensors header, weights, fingerprint, atomic writes, conversion from and to LoRA.

Imports torch, safetensors and `preft_core.orthonormal`.
"""

from preft_core.format.adapter import (
    Adapter,
    AdapterConfig,
    AdapterError,
    check_header,
    check_shapes,
    fingerprint,
    load_adapter,
    save_adapter,
)
from preft_core.format.config import FORMAT_VERSION, HubError, config_faults, parse_config, read_config
from preft_core.format.header import TensorInfo, read_header
from preft_core.format.plain_lora import from_lora, read_lora, to_lora

__all__ = [
    "FORMAT_VERSION",
    "Adapter",
    "AdapterConfig",
    "AdapterError",
    "HubError",
    "TensorInfo",
    "check_header",
    "check_shapes",
    "config_faults",
    "fingerprint",
    "from_lora",
    "load_adapter",
    "parse_config",
    "read_config",
    "read_header",
    "read_lora",
    "save_adapter",
    "to_lora",
]
