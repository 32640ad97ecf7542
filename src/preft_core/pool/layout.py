"""Where an adapter lies in a slot: one flat row of memory per adapter, with views for each place of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from preft_core.format.adapter import Adapter, AdapterConfig
from preft_core.format.config import AdapterError
from preft_core.format.header import raise_faults
from preft_core.ops.weights import Weights
from preft_core.orthonormal import orthonormal_rows

RANKS = (8, 16, 32, 64, 128)
"""Ranks of the slots. An adapter goes into the smallest that holds it, filled up with zeros, which change nothing."""
_ALIGNMENT = 64

Kind = Literal["linear", "block"]


class Bucket(NamedTuple):
    """Slots of one kind and rank: "linear" for LoRA-P, "block" for DiReFT-P and LoReFT."""

    kind: Kind
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} rank {self.rank}"


@dataclass(frozen=True)
class Site:
    """A place in a model where adapters act.

    Attributes:
        name: unique in the model
        kind: "linear" (adds to a linear layer's output) or "block" (edits the output of a decoder layer)
        paths: module paths in the adapter's weight names. Several for linear layers that share their input and whose
            outputs lie side by side in one tensor (q, k, v; gate, up); one otherwise
        in_features: width of the input, D
        widths: width of each path's output; their sum is N
    """

    name: str
    kind: Kind
    paths: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.widths)


def bucket_of(config: AdapterConfig) -> Bucket:
    """Returns the bucket that an adapter goes into.

    Raises:
        AdapterError: a rank above 128.
    """
    rank = next((rank for rank in RANKS if rank >= config.r), None)
    if rank is None:
        raise AdapterError(
            f"r is {config.r}: slots hold ranks up to {RANKS[-1]}; serve this adapter alone (set_adapter), or retrain"
        )
    return Bucket("linear" if config.method == "lora" else "block", rank)


class Layout:
    """The layout of one adapter in a slot of a bucket.

    Attributes:
        sites: those of the bucket's kind
        num_elements: of one slot
    """

    def __init__(self, sites: Iterable[Site], bucket: Bucket):
        self.bucket = bucket
        self.sites = tuple(site for site in sites if site.kind == bucket.kind)
        self._offsets: dict[str, list[int]] = {}
        position = 0
        for site in self.sites:
            self._offsets[site.name] = []
            for shape in self._shapes(site):
                self._offsets[site.name].append(position)
                position += -(-prod(shape) // _ALIGNMENT) * _ALIGNMENT
        self.num_elements = position

    def _shapes(self, site: Site) -> list[tuple[int, ...]]:
        rank = self.bucket.rank
        shapes: list[tuple[int, ...]] = [(len(site.paths), rank, site.in_features), (site.out_features, rank)]
        return [*shapes, (rank,)] if site.kind == "block" else shapes

    def views(self, slab: Tensor) -> dict[str, Weights]:
        """Returns views of a slab (slots, num_elements) by site name."""
        found = {}
        for site in self.sites:
            parts = [
                slab[:, offset : offset + prod(shape)].unflatten(1, shape)
                for offset, shape in zip(self._offsets[site.name], self._shapes(site), strict=True)
            ]
            bias = parts[2] if site.kind == "block" else None
            found[site.name] = Weights(parts[0], parts[1], bias, site.widths)
        return found

    def pack(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """Returns the adapter as one slot's row, (num_elements,) on the CPU; zero where it has no weights.

        Scaling is folded into B in the adapter's own dtype or float32, whichever is wider, before rounding to dtype.
        LoReFT becomes the DiReFT update with A - Q and Q^T, to which it is equal.

        Raises:
            AdapterError: weights for a module that is no site here, or of another shape, or that are not finite in
                dtype. All faults in one message.
        """
        check_sites(
            adapter.config, {p: {k: tuple(t.shape) for k, t in m.items()} for p, m in _of(adapter)}, self.sites
        )
        row = torch.zeros(1, self.num_elements, dtype=dtype)
        weights, modules, rank = self.views(row), dict(_of(adapter)), adapter.config.r
        for site in self.sites:
            target, begin = weights[site.name], 0
            for i, (path, width) in enumerate(zip(site.paths, site.widths, strict=True)):
                if path in modules:
                    a, b, bias = factors(adapter.config, modules[path])
                    target.a[0, i, :rank] = a
                    target.b[0, begin : begin + width, :rank] = b
                    if bias is not None and target.bias is not None:
                        target.bias[0, :rank] = bias
                begin += width
        if not torch.isfinite(row).all():
            raise AdapterError(
                f"an adapter's weights are not finite in {dtype}: its values or its scaling "
                f"{adapter.config.scaling:g} are too large for this model's dtype"
            )
        return row[0]


def check_sites(
    config: AdapterConfig, modules: Mapping[str, Mapping[str, tuple[int, ...]]], sites: Sequence[Site]
) -> None:
    """Checks that every module of an adapter is a site and has its shapes.

    Args:
        modules: path -> leaf name -> shape
    Raises:
        AdapterError: all faults in one message.
    """
    places = {
        path: (site.in_features, width)
        for site in sites
        if site.kind == bucket_of(config).kind
        for path, width in zip(site.paths, site.widths, strict=True)
    }
    faults = []
    for path, leaves in modules.items():
        if path not in places:
            faults.append(f"{path} is no place that this pool was made for")
            continue
        width_in, width_out = places[path]
        expected = {"preft_A": (config.r, width_in), "preft_R": (config.r, width_in)}
        expected |= {"preft_B": (width_out, config.r), "preft_bias": (config.r,)}
        faults += [
            f"{path}.{leaf} has shape {list(shape)} and the model expects {list(expected[leaf])}"
            for leaf, shape in leaves.items()
            if tuple(shape) != expected[leaf]
        ]
    raise_faults("the adapter does not fit this model", faults)


def _of(adapter: Adapter) -> Iterable[tuple[str, dict[str, Tensor]]]:
    return adapter.modules().items()


def factors(config: AdapterConfig, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns A (R, D), scaling * B (N, R), bias (R,) or None."""
    wide = {leaf: t.to(torch.promote_types(t.dtype, torch.float32)) for leaf, t in leaves.items()}
    if config.method == "loreft":
        rows = orthonormal_rows(wide["preft_R"])
        return wide["preft_A"] - rows, rows.T, wide["preft_bias"]
    return wide["preft_A"], wide["preft_B"] * config.scaling, wide.get("preft_bias")
