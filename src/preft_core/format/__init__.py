"""The adapter on disk: config, safetensors header, weights, fingerprint, atomic writes, conversion from and to LoRA.

Imports torch, safetensors and `preft_core.orthonormal`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = ("config", "header", "adapter", "plain_lora")


def __getattr__(name: str) -> Any:
    # not imported before it is asked for: the command line reads preft_core.format.config without torch
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
