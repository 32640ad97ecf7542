"""Every op in plain PyTorch: the specification that faster versions are compared with.

The updates of one adapter are differentiable and used in training. `add_lora_` and `add_direft_` work in place.
"""

from collections.abc import Callable, Iterator

from torch import Tensor
from torch.nn.functional import linear

from preft_core.orthonormal import orthonormal_rows
from preft_core.rule.tokens import Segments


def lora_update(x_TD: Tensor, a_RD: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """Returns the LoRA update of a linear layer, to be added to its output: scaling * B A x.

        update = scaling * (x @ A.T) @ B.T

    Args:
        x_TD: (..., D), floating point, the layer's input
        a_RD: (R, D), dtype of x
        b_NR: (N, R), dtype of x
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA
    Returns: (..., N), a new tensor in x's dtype.
    Source: arXiv 2106.09685, section 4.1; applied to prefill tokens only in arXiv 2605.14217.
    """
    return linear(linear(x_TD, a_RD), b_NR) * scaling


def direft_update(h_TD: Tensor, a_RD: Tensor, b_DR: Tensor, bias_R: Tensor, scaling: float) -> Tensor:
    """Returns the DiReFT update of the residual stream, to be added to it: scaling * B (A h + bias).

        update = scaling * (h @ A.T + bias) @ B.T

    Args:
        h_TD: (..., D), floating point, output of a decoder layer
        a_RD: (R, D), dtype of h, the paper's W1
        b_DR: (D, R), dtype of h, the transpose of the paper's W2
        bias_R: (R,), dtype of h
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA; 1.0 in the paper
    Returns: (..., D), a new tensor in h's dtype.
    Source: arXiv 2404.03592, section 3.2 (DiReFT).
    """
    return linear(linear(h_TD, a_RD, bias_R), b_DR) * scaling


def loreft_update(h_TD: Tensor, a_RD: Tensor, r_RD: Tensor, bias_R: Tensor) -> Tensor:
    """Returns the LoReFT update of the residual stream, to be added to it: Q^T (A h + bias - Q h).

        Q = orthonormal_rows(R);  update = (h @ (A - Q).T + bias) @ Q

    Args:
        h_TD: (..., D), floating point, output of a decoder layer
        a_RD: (R, D), dtype of h, the paper's W
        r_RD: (R, D), dtype of h, full row rank; the paper's R after orthonormalisation
        bias_R: (R,), dtype of h
    Returns: (..., D), a new tensor in h's dtype.
    Source: arXiv 2404.03592, equation 2 (LoReFT).
    """
    q_RD = orthonormal_rows(r_RD)
    return linear(linear(h_TD, a_RD - q_RD, bias_R), q_RD.T)


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """Adds to each adapted row of a packed batch the LoRA update of its own slot. See `preft_core.ops.add_lora_`.

        for row, slot in adapted rows:
            for l, columns in enumerate(the L slices of the N columns, of the given widths):
                output[row, columns] += b[slot, columns] @ (a[slot, l] @ x[row])

    in float32, rounded once to output's dtype.
    """
    for rows, slot in _tiles(segments):
        x, output, begin = x_TD[rows].float(), output_TN[rows].float(), 0
        for a_RD, width in zip(a_SLRD[slot], widths, strict=True):
            columns = slice(begin, begin + width)
            output[:, columns] += linear(linear(x, a_RD.float()), b_SNR[slot, columns].float())
            begin += width
        output_TN[rows] = output.to(output_TN.dtype)


def lora_linear(
    x_TD: Tensor,
    weight_ND: Tensor,
    a_SLRD: Tensor,
    b_SNR: Tensor,
    widths: tuple[int, ...],
    segments: Segments,
    add: Callable[..., None] = add_lora_,
) -> Tensor:
    """Returns x @ weight.T with the LoRA updates added. See `preft_core.ops.lora_linear`.

    Args:
        add: the `add_lora_` that adds the updates
    """
    output_TN = linear(x_TD, weight_ND)
    add(output_TN, x_TD, a_SLRD, b_SNR, widths, segments)
    return output_TN


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """Adds to each adapted row of a packed batch the DiReFT update of its own slot. See `preft_core.ops.add_direft_`.

        for row, slot in adapted rows:
            hidden[row] += b[slot] @ (a[slot] @ hidden[row] + bias[slot])

    in float32, rounded once to hidden's dtype.
    """
    for rows, slot in _tiles(segments):
        hidden = hidden_TD[rows].float()
        low = linear(hidden, a_SRD[slot].float(), bias_SR[slot].float())
        hidden_TD[rows] = (hidden + linear(low, b_SDR[slot].float())).to(hidden_TD.dtype)


def _tiles(segments: Segments) -> Iterator[tuple[Tensor, int]]:
    """Yields (rows int64, slot) of each used tile. Synchronises with the device."""
    for first, count, slot in segments.tiles.tolist():
        if count:
            yield segments.rows[first : first + count].long(), slot
