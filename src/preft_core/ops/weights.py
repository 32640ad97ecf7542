"""The weights that an op reads: those of all slots at one site of a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of all slots of a bucket at one site. Views of the pool's memory, at fixed addresses.

    Attributes:
        a: (slots, paths, rank, in_features)
        b: (slots, out_features, rank), scaling folded in
        bias: (slots, rank) for a block, else None
        widths: output width of each layer; several where layers share their input. Their sum is out_features
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
