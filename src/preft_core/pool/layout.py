"""The layout of an adapter in a slot: one flat row of memory per adapter, with views for each site of a model."""

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
"""The ranks of slots. An adapter goes into the smallest that fits, padded with zeros, which change nothing."""
_ALIGNMENT = 64

Kind = Literal["linear", "block"]


class Bucket(NamedTuple):
    """The slots of one kind and rank: "linear" for LoRA-P, "block" for DiReFT-P and LoReFT."""

    kind: Kind
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} rank {self.rank}"


@dataclass(frozen=True)
class Site:
    """A target of adapters in a model.

    Attributes:
        name: unique in the model
        kind: "linear" (adds to a linear layer's output) or "block" (edits a decoder layer's output)
        paths: module paths in the adapter's weight names. Several for linear layers that share their input and whose
            outputs lie side by side in one tensor (q, k, v; gate, up); otherwise one
        in_features: input width, D
        widths: output width of each path; their sum is N
    """

    name: str
    kind: Kind
    paths: tuple[str, ...]
    in_features: int
    widths: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """The output width of all paths, N."""
        return sum(self.widths)


def bucket_of(config: AdapterConfig) -> Bucket:
    """Returns the bucket of an adapter: its kind, and the smallest rank of RANKS that fits.

    Args:
        config: method and r are used
    Raises:
        AdapterError: a rank above 128.
    """
    rank = next((rank for rank in RANKS if rank >= config.r), None)
    if rank is None:
        raise AdapterError(
            f"r is {config.r}: slots have ranks up to {RANKS[-1]}; serve this adapter alone (set_adapter), or retrain"
        )
    return Bucket("linear" if config.method == "lora" else "block", rank)


class Layout:
    """The layout of one adapter in a slot of a bucket.

    Args:
        sites: of the model; those of the bucket's kind are used
        bucket: kind and rank of the slots
    Attributes:
        bucket: as given
        sites: those of the bucket's kind
        num_elements: elements of one slot
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
        """Returns the weights in a slab, by site name.

        Args:
            slab: (slots, num_elements)
        Returns: views of slab, see `Weights`.
        """
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
        """Returns the adapter as one slot's row; zero where it has no weights.

        Scaling is folded into B in the adapter's dtype or float32, whichever is wider, before rounding to dtype.
        LoReFT is packed as the equivalent DiReFT update, with A - Q and Q^T.

        Args:
            adapter: of this bucket
            dtype: of the slots
        Returns: (num_elements,), dtype, on the CPU, a new tensor.
        Raises:
            AdapterError: weights of a module that is not a site, of another shape, or not finite in dtype. All faults
                of names and shapes in one message.
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
    """Checks that every module of an adapter is a site and has the site's shapes.

    Args:
        config: kind and rank of the adapter
        modules: path -> leaf name -> shape
        sites: of the model
    Raises:
        AdapterError: all faults in one message.
    """
    features = {
        path: (site.in_features, width)
        for site in sites
        if site.kind == bucket_of(config).kind
        for path, width in zip(site.paths, site.widths, strict=True)
    }
    faults = []
    for path, leaves in modules.items():
        if path not in features:
            faults.append(f"{path} is not a site of this pool")
            continue
        width_in, width_out = features[path]
        expected = {"preft_A": (config.r, width_in), "preft_R": (config.r, width_in)}
        expected |= {"preft_B": (width_out, config.r), "preft_bias": (config.r,)}
        faults += [
            f"{path}.{leaf} has shape {list(shape)} and the model expects {list(expected[leaf])}"
            for leaf, shape in leaves.items()
            if tuple(shape) != expected[leaf]
        ]
    raise_faults("the adapter does not match this model", faults)


def _of(adapter: Adapter) -> Iterable[tuple[str, dict[str, Tensor]]]:
    return adapter.modules().items()


def factors(config: AdapterConfig, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the matrices of one module's update: y += B (A x + bias).

    Args:
        config: method and scaling
        leaves: by leaf name, any floating-point dtype
    Returns: A (R, D), scaling * B (N, R), and bias (R,) or None; in the leaves' dtype or float32, whichever is wider.
    """
    wide = {leaf: t.to(torch.promote_types(t.dtype, torch.float32)) for leaf, t in leaves.items()}
    if config.method == "loreft":
        rows = orthonormal_rows(wide["preft_R"])
        return wide["preft_A"] - rows, rows.T, wide["preft_bias"]
    return wide["preft_A"], wide["preft_B"] * config.scaling, wide.get("preft_bias")
