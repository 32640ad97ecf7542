"""Target modules of a TGI model: TGI's layers, their names in an adapter, and this shard's part of each.

Reads attributes of TGI's layers and imports nothing of TGI, so that it is tested without TGI.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.format.adapter import Adapter
from preft_core.pool.layout import Site

SITE = "__preft_site__"
"""Attribute of a target module: the name of its site."""
COLUMN, ROW = "TensorParallelMultiAdapterLinear", "TensorParallelAdapterRowLinear"
BLOCKS = {"FlashLlamaLayer", "MistralLayer", "Qwen2Layer", "FlashGemma2Layer", "FlashGemma3Layer"}
"""Decoder layers whose output is known: one tensor, or (hidden, residual) whose sum is the residual stream."""


class UnsupportedModel(ValueError):
    """The model cannot serve PreFT adapters in TGI."""


@dataclass(frozen=True)
class TargetModule:
    """A target module of the whole model, and the part of it that this shard computes.

    Attributes:
        module: TGI's layer
        whole: the site with the widths of the whole model, as in an adapter's files
        rows: path -> rows of B on this shard; None for all
        columns: columns of A on this shard; None for all
    """

    module: nn.Module
    whole: Site
    rows: Mapping[str, Tensor] | None = None
    columns: slice | None = None

    @property
    def local(self) -> Site:
        """The site with this shard's widths."""
        widths = self.whole.widths
        if self.rows is not None:
            widths = tuple(len(self.rows[path]) for path in self.whole.paths)
        width_in = self.whole.in_features
        if self.columns is not None:
            width_in = self.columns.stop - self.columns.start
        return replace(self.whole, in_features=width_in, widths=widths)


def find_target_modules(model: Any, config: Any, rank: int = 0, world_size: int = 1) -> list[TargetModule]:
    """Returns the target modules of a TGI model, in the model's order.

    Args:
        model: TGI's module of a causal language model, with `model.layers`
        config: of the model, as transformers reads it
        rank, world_size: of this process in tensor parallel
    Raises:
        UnsupportedModel: it has none, or its config's sizes differ from the loaded weights.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedModel(_nowhere(model))
    targets: list[TargetModule] = []
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        for name, module in layer.named_modules():
            kind = type(module).__name__
            if kind == COLUMN:
                target = _column_target(module, f"{prefix}.{name}", config, rank, world_size)
            elif kind == ROW:
                target = _row_target(module, f"{prefix}.{name}", config, rank, world_size)
            else:
                continue
            if target is not None:
                targets.append(target)
        if type(layer).__name__ in BLOCKS:
            hidden = config.hidden_size
            targets.append(
                TargetModule(layer, Site(f"{prefix}.preft", "block", (f"{prefix}.preft",), hidden, (hidden,)))
            )
    if not targets:
        raise UnsupportedModel(_nowhere(model))
    _check_weights(targets)
    return targets


def shard_adapter(adapter: Adapter, targets: Sequence[TargetModule]) -> Adapter:
    """Returns this shard's part of an adapter; the adapter itself if it is not cut."""
    cuts = {path: target for target in targets for path in target.whole.paths if target.rows or target.columns}
    tensors = {}
    for name, tensor in adapter.tensors.items():
        path, leaf = name.removeprefix("base_model.model.").rsplit(".", 1)
        target = cuts.get(path)
        if target is not None and leaf == "preft_A" and target.columns is not None:
            tensor = tensor[:, target.columns]
        if target is not None and leaf == "preft_B" and target.rows is not None:
            tensor = tensor[target.rows[path]]
        tensors[name] = tensor
    return replace(adapter, tensors=tensors) if cuts else adapter


def fix_layer_names(model: Any) -> int:
    """Shortens layer names that are full paths (qwen2, starcoder2) to the names that TGI's adapters look for.

    Returns: number of changed layers.
    """
    changed = 0
    for module in model.modules():
        if type(module).__name__ == COLUMN and module.layer_names is not None:
            short = [name.rpartition(".")[2] for name in module.layer_names]
            changed += short != module.layer_names
            module.layer_names = short
        elif type(module).__name__ == ROW and module.layer_name is not None:
            short_name = module.layer_name.rpartition(".")[2]
            changed += short_name != module.layer_name
            module.layer_name = short_name
    return changed


def _column_target(module: Any, name: str, config: Any, rank: int, world_size: int) -> TargetModule | None:
    parent, _, own = name.rpartition(".")
    names = [name.rpartition(".")[2] for name in module.layer_names or []]
    if not names and own == "gate_up_proj":
        # phi3: TGI does not name its packed layer
        names = ["gate_up_proj"]
    blocks = _packed_blocks(names, config)
    if not names or (blocks is None and module.sizes is None):
        return None
    paths = tuple(f"{parent}.{short}" for short in names)
    sizes = [sum(blocks)] if blocks is not None else list(module.sizes)[: len(names)]
    site = Site(name, "linear", paths, config.hidden_size, tuple(sizes))
    if world_size == 1:
        return TargetModule(module, site)
    parts = [blocks] if blocks is not None else [[size] for size in sizes]
    rows = {path: _shard_of(part, rank, world_size) for path, part in zip(paths, parts, strict=True)}
    return TargetModule(module, site, rows=rows)


def _row_target(module: Any, name: str, config: Any, rank: int, world_size: int) -> TargetModule | None:
    if module.layer_name is None:
        return None
    parent, _, own = name.rpartition(".")
    heads = config.num_attention_heads * _head_size(config)
    width_in = heads if own == "o_proj" else config.intermediate_size
    path = f"{parent}.{module.layer_name.rpartition('.')[2]}"
    site = Site(name, "linear", (path,), width_in, (config.hidden_size,))
    if world_size == 1:
        return TargetModule(module, site)
    width = width_in // world_size
    return TargetModule(module, site, columns=slice(rank * width, (rank + 1) * width))


def _packed_blocks(names: Sequence[str], config: Any) -> list[int] | None:
    """Returns the widths of the parts of a packed layer's output. Tensor parallel cuts each part."""
    if list(names) == ["qkv_proj"]:
        head = _head_size(config)
        return [head * count for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    if list(names) == ["gate_up_proj"]:
        return [config.intermediate_size] * 2
    return None


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shard_of(blocks: Sequence[int], rank: int, world_size: int) -> Tensor:
    """Returns the rows of a shard, int64: its part of each block."""
    parts, begin = [], 0
    for size in blocks:
        width = size // world_size
        parts.append(torch.arange(begin + rank * width, begin + (rank + 1) * width))
        begin += size
    return torch.cat(parts)


def _check_weights(targets: Sequence[TargetModule]) -> None:
    """Compares the target modules with the loaded weights, except quantized ones."""
    faults = []
    for target in targets:
        weight = _weight(target.module)
        expected = (target.local.out_features, target.local.in_features)
        if weight is not None and tuple(weight.shape) != expected:
            faults.append(f"{target.whole.name} has weights {list(weight.shape)}, expected {list(expected)}")
    if faults:
        raise UnsupportedModel("the sizes of this model's layers differ from its config: " + "; ".join(faults[:5]))


def _weight(module: nn.Module) -> Tensor | None:
    linear = getattr(getattr(module, "base_layer", None), "linear", None)
    weight = getattr(linear, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.itemsize > 1 else None


def _nowhere(model: Any) -> str:
    return (
        f"TGI serves this model as {type(model).__name__}, which has no target modules: PreFT adapters "
        "are for llama, phi3, granite, mistral, qwen2, gemma2, gemma3 (text) and starcoder2; unset PREFT_ADAPTERS, or "
        "PREFT_DISABLE=1 to serve the model alone"
    )


def modules_of(targets: Sequence[TargetModule]) -> Iterator[tuple[nn.Module, str]]:
    """Yields each target module and the name of its site."""
    for target in targets:
        yield target.module, target.whole.name
