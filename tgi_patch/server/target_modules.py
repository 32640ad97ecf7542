"""Where in a TGI model adapters act, under which names an adapter knows these places, and what a shard holds of them.

Duck-typed: it reads attributes of TGI's layers and imports nothing of TGI, so that it is tested without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.format.adapter import Adapter
from preft_core.pool.layout import Site

SITE = "__preft_site__"
"""Attribute of a layer that adapters act at: the name of its site."""
COLUMN, ROW = "TensorParallelMultiAdapterLinear", "TensorParallelAdapterRowLinear"
BLOCKS = {"FlashLlamaLayer", "MistralLayer", "Qwen2Layer", "FlashGemma2Layer", "FlashGemma3Layer"}
"""Decoder layers whose output was read: one tensor, or (hidden, residual) with the stream as their sum."""


class UnsupportedModel(ValueError):
    """A model that TGI serves without the layers that adapters need."""


@dataclass(frozen=True)
class Place:
    """A site of the whole model and the part of it that this shard computes.

    Attributes:
        module: TGI's layer
        whole: the site as an adapter sees it
        rows: path -> the rows of B that this shard has, None for all
        columns: the columns of A that this shard has, None for all
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


def find_places(model: Any, config: Any, rank: int = 0, world_size: int = 1) -> list[Place]:
    """Returns the places of a TGI model, in the model's order.

    Args:
        model: TGI's module of a causal language model, with `model.layers`
        config: of the model, as transformers reads it
        rank, world_size: of this process in tensor parallel
    Raises:
        UnsupportedModel: no such layers, or sizes that are not those of the loaded weights.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UnsupportedModel(_nowhere(model))
    places: list[Place] = []
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        for name, module in layer.named_modules():
            kind = type(module).__name__
            if kind == COLUMN:
                place = _column_place(module, f"{prefix}.{name}", config, rank, world_size)
            elif kind == ROW:
                place = _row_place(module, f"{prefix}.{name}", config, rank, world_size)
            else:
                continue
            if place is not None:
                places.append(place)
        if type(layer).__name__ in BLOCKS:
            hidden = config.hidden_size
            places.append(Place(layer, Site(f"{prefix}.preft", "block", (f"{prefix}.preft",), hidden, (hidden,))))
    if not places:
        raise UnsupportedModel(_nowhere(model))
    _check_weights(places)
    return places


def shard_adapter(adapter: Adapter, places: Sequence[Place]) -> Adapter:
    """Returns the part of an adapter that this shard computes; the adapter itself where that is all of it."""
    cuts = {path: place for place in places for path in place.whole.paths if place.rows or place.columns}
    tensors = {}
    for name, tensor in adapter.tensors.items():
        path, leaf = name.removeprefix("base_model.model.").rsplit(".", 1)
        place = cuts.get(path)
        if place is not None and leaf == "preft_A" and place.columns is not None:
            tensor = tensor[:, place.columns]
        if place is not None and leaf == "preft_B" and place.rows is not None:
            tensor = tensor[place.rows[path]]
        tensors[name] = tensor
    return replace(adapter, tensors=tensors) if cuts else adapter


def fix_layer_names(model: Any) -> int:
    """Gives layers whose names are full paths (qwen2, starcoder2) the names that TGI's adapters look for.

    Returns: how many layers were changed.
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


def _column_place(module: Any, name: str, config: Any, rank: int, world_size: int) -> Place | None:
    parent, _, own = name.rpartition(".")
    names = [name.rpartition(".")[2] for name in module.layer_names or []]
    if not names and own == "gate_up_proj":
        # phi3: TGI gives its packed layer no name
        names = ["gate_up_proj"]
    blocks = _packed_blocks(names, config)
    if not names or (blocks is None and module.sizes is None):
        return None
    paths = tuple(f"{parent}.{short}" for short in names)
    sizes = [sum(blocks)] if blocks is not None else list(module.sizes)[: len(names)]
    site = Site(name, "linear", paths, config.hidden_size, tuple(sizes))
    if world_size == 1:
        return Place(module, site)
    parts = [blocks] if blocks is not None else [[size] for size in sizes]
    rows = {path: _shard_of(part, rank, world_size) for path, part in zip(paths, parts, strict=True)}
    return Place(module, site, rows=rows)


def _row_place(module: Any, name: str, config: Any, rank: int, world_size: int) -> Place | None:
    if module.layer_name is None:
        return None
    parent, _, own = name.rpartition(".")
    heads = config.num_attention_heads * _head_size(config)
    width_in = heads if own == "o_proj" else config.intermediate_size
    path = f"{parent}.{module.layer_name.rpartition('.')[2]}"
    site = Site(name, "linear", (path,), width_in, (config.hidden_size,))
    if world_size == 1:
        return Place(module, site)
    width = width_in // world_size
    return Place(module, site, columns=slice(rank * width, (rank + 1) * width))


def _packed_blocks(names: Sequence[str], config: Any) -> list[int] | None:
    """Returns the widths that a packed layer's output is made of; each is cut by itself in tensor parallel."""
    if list(names) == ["qkv_proj"]:
        head = _head_size(config)
        return [head * count for count in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
    if list(names) == ["gate_up_proj"]:
        return [config.intermediate_size] * 2
    return None


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shard_of(blocks: Sequence[int], rank: int, world_size: int) -> Tensor:
    """Returns the rows of a shard, int64: of each block its own part."""
    parts, begin = [], 0
    for size in blocks:
        width = size // world_size
        parts.append(torch.arange(begin + rank * width, begin + (rank + 1) * width))
        begin += size
    return torch.cat(parts)


def _check_weights(places: Sequence[Place]) -> None:
    """Compares the sites with the loaded weights where these are not quantized."""
    faults = []
    for place in places:
        weight = _weight(place.module)
        expected = (place.local.out_features, place.local.in_features)
        if weight is not None and tuple(weight.shape) != expected:
            faults.append(f"{place.whole.name} has weights {list(weight.shape)} and not {list(expected)}")
    if faults:
        raise UnsupportedModel(
            "the sizes of this model's layers are not those that its config gives: " + "; ".join(faults[:5])
        )


def _weight(module: nn.Module) -> Tensor | None:
    linear = getattr(getattr(module, "base_layer", None), "linear", None)
    weight = getattr(linear, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype.itemsize > 1 else None


def _nowhere(model: Any) -> str:
    return (
        f"TGI serves this model as {type(model).__name__}, without layers that adapters can act at: PreFT adapters "
        "are for llama, phi3, granite, mistral, qwen2, gemma2, gemma3 (text) and starcoder2; unset PREFT_ADAPTERS, or "
        "PREFT_DISABLE=1 to serve the model alone"
    )


def modules_of(places: Sequence[Place]) -> Iterator[tuple[nn.Module, str]]:
    """Yields each place's layer and the name of its site."""
    for place in places:
        yield place.module, place.whole.name
