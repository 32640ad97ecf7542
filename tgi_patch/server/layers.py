"""What replaces TGI's functions. Each takes the shard and the original and returns the replacement.

`patches` is the table. TGI's modules are imported inside functions, so that this module is tested without them.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from preft_core.format.config import MAX_CONFIG_BYTES, parse_json, read_limited
from tgi_patch.server.prefixes import OWNER
from tgi_patch.server.routing import TICKET, add_linear, current
from tgi_patch.server.shard import Shard
from tgi_patch.server.target_modules import SITE, fix_layer_names


def column_forward(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds PreFT adapters to q, k, v, gate and up projections after TGI's own forward."""

    @functools.wraps(original)
    def forward(self: Any, input: Any, adapter_data: Any) -> Any:
        result = original(self, input, adapter_data)
        route = current()
        site = getattr(self, SITE, None)
        if route is None or site is None:
            return result
        add_linear(route, site, result.view(-1, result.shape[-1]), input.reshape(-1, input.shape[-1]))
        return result

    return forward


def row_forward(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds adapters to o and down projections before the sum over shards. TGI adds its own after it."""

    @functools.wraps(original)
    def forward(self: Any, input: Any, adapter_data: Any) -> Any:
        route = current()
        site = getattr(self, SITE, None)
        if site is None:
            route = None
        world_size = self.process_group.size()
        if world_size == 1 or not (route is not None or (shard.fixes("rows") and _has_lora(self, adapter_data))):
            result = original(self, input, adapter_data)
            if route is not None:
                add_linear(route, str(site), result, input)
            return result
        result = self.base_layer(input, reduce=False)
        if route is not None:
            add_linear(route, str(site), result, input)
        if _has_lora(self, adapter_data):
            width = result.shape[-1] // world_size
            begin = self.process_group.rank() * width
            self.forward_layer_type(result, input, adapter_data, self.layer_name, begin, begin + width)
        _all_reduce(result, self.process_group)
        return result

    return forward


def from_tokenized(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves each request's adapter. Raises for an unknown one, which TGI would serve as the base model."""

    @functools.wraps(original)
    def resolved(cls: Any, pb: Any, tokenizer: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tickets = [shard.ticket(request) for request in pb.requests]
        owners = [shard.owner(request, ticket) for request, ticket in zip(pb.requests, tickets, strict=True)]
        found = None if shard.prefixes is None else shard.prefixes.find(pb.requests, owners, inputs)
        batch = original(cls, pb, tokenizer, inputs, *args, **kwargs)
        rows = zip(batch.stopping_criterias, tickets, owners, pb.requests, strict=True)
        for criterion, ticket, owner, request in rows:
            setattr(criterion, TICKET, ticket)
            setattr(criterion, OWNER, owner if request.blocks else None)
        if shard.prefixes is not None and found is not None:
            shard.prefixes.fill(batch, found)
        return batch

    return resolved


def generate_token(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Routes the prefill rows of a forward to their adapters. Decode forwards are TGI's alone."""

    @functools.wraps(original)
    def routed_token(self: Any, batch: Any) -> Any:
        if not batch.prefilling:
            return original(self, batch)
        before = list(batch.prefilling_mask)
        with shard.route(batch):
            result = original(self, batch)
        shard.keep_prefixes(batch, before)
        for criterion, prefilling in zip(batch.stopping_criterias, batch.prefilling_mask, strict=True):
            if not prefilling:
                # the prompt is in the KV cache: decode does not need the adapter
                setattr(criterion, TICKET, None)
        return result

    return routed_token


def warmup(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the warm-up prefill through empty slots, so that its memory is not given to the KV cache."""

    @functools.wraps(original)
    def warmed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with shard.warming(self):
            return original(self, *args, **kwargs)

    return warmed


def model_forward(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a decode batch with an all-token LoRA without CUDA graphs, which were captured without adapters."""

    @functools.wraps(original)
    def forward(self: Any, batch: Any, adapter_data: Any) -> Any:
        decode = batch.cu_seqlen_prefill is None
        if not (decode and self.cuda_graphs and shard.fixes("graphs") and _any_lora(adapter_data)):
            return original(self, batch, adapter_data)
        graphs, self.cuda_graphs = self.cuda_graphs, {}
        try:
            return original(self, batch, adapter_data)
        finally:
            self.cuda_graphs = graphs

    return forward


def lora_config_load(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a LoRA with options that TGI ignores."""

    @functools.wraps(original)
    def load(cls: Any, adapter_id: str, api_token: Any) -> Any:
        if shard.fixes("options"):
            faults = lora_faults(_config_of(adapter_id, api_token))
            if faults:
                raise ValueError(
                    f"LORA_ADAPTERS: {adapter_id} would be served wrong: {'; '.join(faults)}; retrain it without "
                    "them, or set PREFT_LORA_FIXES without `options` to serve it as TGI does"
                )
        return original(cls, adapter_id, api_token)

    return load


def lora_faults(config: dict[str, Any]) -> list[str]:
    """Returns the options of a LoRA's adapter_config that TGI 3.3.7 ignores."""
    peft_type = config.get("peft_type")
    faults = [] if peft_type == "LORA" else [f"peft_type is {peft_type}: must be LORA"]
    faults += [
        f"{name} is {config[name]!r}"
        for name in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "modules_to_save",
            "fan_in_fan_out",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
        )
        if config.get(name)
    ]
    if config.get("bias") not in (None, "none"):
        faults.append(f"bias is {config['bias']!r}")
    targets = config.get("target_modules") or ()
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "c_proj", "c_fc"}
    unknown = [] if isinstance(targets, str) else sorted(set(targets) - known)
    if unknown:
        faults.append(f"target_modules has {', '.join(unknown)}, which TGI does not adapt")
    return faults


def model_with_adapters(shard: Shard, original: Callable[..., Any]) -> Callable[..., Any]:
    """Finds the target modules of the loaded model and allocates the slots, before the KV cache is sized."""

    @functools.wraps(original)
    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        if shard.fixes("names"):
            fix_layer_names(model.model)
        shard.attach(model)
        return model

    return loaded


def _config_of(adapter_id: str, token: Any) -> dict[str, Any]:
    """Returns the adapter_config.json of a directory or a repository."""
    file = Path(adapter_id) / "adapter_config.json"
    if not file.exists():
        file = Path(hf_hub_download(adapter_id, "adapter_config.json", token=token))
    config = parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file))
    return config if isinstance(config, dict) else {}


def _has_lora(layer: Any, adapter_data: Any) -> bool:
    return adapter_data is not None and layer.layer_name is not None and bool(adapter_data.data.get(layer.layer_name))


def _any_lora(adapter_data: Any) -> bool:
    return adapter_data is not None and any(adapter_data.meta.adapter_set or ()) and bool(adapter_data.data)


def _all_reduce(tensor: Any, group: Any) -> None:
    """Sums over shards as TGI's own row-parallel layer does."""
    from text_generation_server.layers import tensor_parallel  # pyright: ignore[reportMissingImports]

    if tensor_parallel.SYSTEM == "ipex" and tensor.device.type == "cpu":
        tensor_parallel.ipex.distributed.all_reduce(tensor, group=group)
    else:
        torch.distributed.all_reduce(tensor, group=group)
