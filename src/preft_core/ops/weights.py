"""The weights that an op reads: those of all slots at one place of a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights of all slots of a bucket at one site: views, whose addresses stay.

    Attributes:
        a: (slots, paths, rank, in_features)
        b: (slots, out_features, rank), scaling folded in
        bias: (slots, rank) for a block, else None
        widths: width of each layer's output where several share an input; their sum is out_features
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
