"""Loads an adapter in a vLLM worker: checked as docs/explain/format.md says, then made vLLM's LoRA weights.

Each replacement takes vLLM's original function and returns the new one; `patches` is the table. vLLM is imported
inside functions only.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from preft_core.format.adapter import Adapter
from preft_core.format.config import CONFIG_NAME, MAX_CONFIG_BYTES, parse_json, read_limited
from preft_core.format.header import raise_faults
from preft_core.pool.layout import factors
from preft_vllm.blocks import BLOCK_LEAF, add_blocks
from preft_vllm.files import OpenFiles
from preft_vllm.stamp import Stamp, stamp_of
from preft_vllm.steps import STATES

STAMP, FILES, ELSEWHERE = "__preft_stamp__", "__preft_files__", "__preft_elsewhere__"


def load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Registers DiReFT-P targets on a loaded model, and gives the V2 runner's LoRA state the request states."""

    @functools.wraps(original)
    def loaded(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        result = original(self, model, vllm_config, device)
        add_blocks(self.lora_manager._adapter_manager, vllm_config)
        if hasattr(self, "lora_state"):
            setattr(self.lora_state, STATES, self.req_states)
        return result

    return loaded


def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a PreFT adapter by its stamp. Other content is refused."""

    @functools.wraps(original)
    def load(self: Any, lora_request: Any) -> Any:
        stamp = stamp_of(lora_request)
        if stamp is None:
            return original(self, lora_request)
        adapter = vars(self).setdefault(FILES, OpenFiles()).load(stamp)
        return to_vllm(adapter, stamp, self._adapter_manager, self.lora_config, lora_request.lora_int_id)

    return load


def add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses an id under which this worker has another adapter."""

    @functools.wraps(original)
    def added(self: Any, lora_request: Any) -> Any:
        known = self._adapter_manager.get_adapter(lora_request.lora_int_id)
        if known is not None:
            here, wanted = getattr(known, STAMP, None), stamp_of(lora_request)
            if here != wanted:
                raise RuntimeError(
                    f"lora_int_id {lora_request.lora_int_id} is {_named(here)} in this worker and {_named(wanted)} in "
                    "a request: one id is one adapter; use one API server, or assign the ids yourself"
                )
        return original(self, lora_request)

    return added


def config_from_directory(original: Callable[..., Any], why: str) -> Callable[..., Any]:
    """Refuses a PreFT adapter in vLLM's own loading, with the reason. For `PEFTHelper.from_local_dir`."""

    def load(cls: Any, lora_path: str, max_position_embeddings: int | None) -> Any:
        file = Path(lora_path) / CONFIG_NAME
        if file.is_file():
            config = parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file))
            if isinstance(config, dict) and config.get("peft_type") == "PREFT":
                raise ValueError(f"{lora_path} is a prefill-only (PreFT) adapter and cannot be served: {why}")
        return original(cls, lora_path, max_position_embeddings)

    return functools.wraps(original)(load)


def to_vllm(adapter: Adapter, stamp: Stamp, manager: Any, lora_config: Any, number: int) -> Any:
    """Returns an adapter as vLLM's LoRAModel, with vLLM's names of the layers.

    Scaling is folded into B. DiReFT-P and LoReFT become A (r, hidden + 1), the bias in its last column, and
    B (hidden, r).

    Args:
        manager: vLLM's LoRAModelManager
        lora_config: max_lora_rank and lora_dtype are used
        number: lora_int_id
    Raises:
        AdapterError: a rank above max_lora_rank, layers that vLLM does not adapt, wrong shapes, or values that are not
            finite in lora_dtype. All faults in one message.
    """
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.lora_weights import LoRALayerWeights  # pyright: ignore[reportMissingImports]

    rank, faults, loras = adapter.config.r, [], {}
    if rank > lora_config.max_lora_rank:
        faults.append(f"r is {rank}, above max_lora_rank={lora_config.max_lora_rank}: start vLLM with a higher one")
    shapes = _shapes(manager)
    for path, leaves in adapter.modules().items():
        name = _vllm_name(path, manager.model)
        a, b, bias = factors(adapter.config, leaves)
        if name not in shapes:
            if not _elsewhere(name, manager.model):
                faults.append(_no_target(path, adapter.config.method, manager))
            continue
        if (a.shape[1], b.shape[0]) != shapes[name]:
            faults.append(f"{path} has {a.shape[1]} -> {b.shape[0]} features and the model has {shapes[name]}")
            continue
        if bias is not None:
            a = torch.cat([a, bias[:, None]], dim=1)
        a, b = a.to(lora_config.lora_dtype).contiguous(), b.to(lora_config.lora_dtype).contiguous()
        if not (a.isfinite().all() and b.isfinite().all()):
            faults.append(f"{path} is not finite in {lora_config.lora_dtype}")
        loras[name] = LoRALayerWeights(name, rank, rank, a, b, 1.0)
    raise_faults(f"adapter {stamp.location} cannot be served", faults)
    if not loras:
        # a pipeline worker that has none of its layers: vLLM needs one entry, and ignores names that it does not have
        a, b = (torch.zeros(shape, dtype=lora_config.lora_dtype) for shape in ((rank, 1), (1, rank)))
        loras[ELSEWHERE] = LoRALayerWeights(ELSEWHERE, rank, rank, a, b, 1.0)
    model = LoRAModel(number, rank, loras)
    setattr(model, STAMP, stamp)
    return model


def _named(stamp: Stamp | None) -> str:
    return "an all-token LoRA" if stamp is None else f"{stamp.location} ({stamp.fingerprint[:15]}...)"


def _vllm_name(path: str, model: Any) -> str:
    """Returns vLLM's name of a module of the transformers model."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return path
    found = mapper.get_rename_mapper()._map_name(f"{path}.weight")
    return path if found is None else found.removesuffix(".weight")


def _shapes(manager: Any) -> Mapping[str, tuple[int, int]]:
    """Returns the unsharded (in, out) of each target by its name in an adapter's weights."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in manager.modules.items():
        if name.endswith(f".{BLOCK_LEAF}"):
            found[name] = (module.hidden_size, module.hidden_size)
            continue
        layer = getattr(module, "base_layer", None)
        if layer is None or not hasattr(layer, "input_size"):
            continue
        width_in = layer.input_size
        parts = manager.packed_modules.get(name)
        if parts is None:
            found[name] = (width_in, layer.output_size)
            continue
        widths = _widths(layer)
        if len(widths) == len(parts):
            found |= {part: (width_in, width) for part, width in zip(parts, widths, strict=True)}
    return found


def _widths(layer: Any) -> list[int]:
    """Returns the unsharded output widths of the parts of a packed layer."""
    if hasattr(layer, "total_num_kv_heads"):
        keys = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
    return list(getattr(layer, "output_sizes", []))


def _elsewhere(name: str, model: Any) -> bool:
    """Returns whether another pipeline worker has the layer."""
    from vllm.model_executor.models.utils import PPMissingLayer  # pyright: ignore[reportMissingImports]

    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        try:
            module = model.get_submodule(".".join(parts[:end]))
        except AttributeError:
            return False
        if isinstance(module, PPMissingLayer):
            return True
    return False


def _no_target(path: str, method: str, manager: Any) -> str:
    if method != "lora" and not any(name.endswith(f".{BLOCK_LEAF}") for name in manager.modules):
        model = type(manager.model).__name__
        return f"method is {method}, which is not supported for {model}: see docs/how-to/vllm.md"
    return f"{path} is not a layer that vLLM adapts in {type(manager.model).__name__}: retrain without it"
