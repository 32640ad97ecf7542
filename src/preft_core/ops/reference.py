"""Every op in plain PyTorch: the specification that faster versions are compared with. Differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_update(x_TD: Tensor, a_RD: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """Returns the LoRA update of a linear layer, to be added to its output: scaling * B A x.

        update = scaling * (x @ A.T) @ B.T

    Args:
        x_TD: the layer's input, (..., D), floating
        a_RD: (R, D), dtype of x
        b_NR: (N, R), dtype of x
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA
    Returns: (..., N), a new tensor.
    Source: arXiv 2106.09685, section 4.1; applied to prefill tokens only in arXiv 2605.14217.
    """
    return linear(linear(x_TD, a_RD), b_NR) * scaling


def direft_update(h_TD: Tensor, a_RD: Tensor, b_DR: Tensor, bias_R: Tensor, scaling: float) -> Tensor:
    """Returns the DiReFT update of the residual stream, to be added to it: scaling * B (A h + bias).

        update = scaling * (h @ A.T + bias) @ B.T

    Args:
        h_TD: output of a decoder layer, (..., D), floating
        a_RD: (R, D), the paper's W1
        b_DR: (D, R), the transpose of the paper's W2
        bias_R: (R,)
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA; 1.0 in the paper
    Returns: (..., D), a new tensor.
    Source: arXiv 2404.03592, section 3.2 (DiReFT).
    """
    return linear(linear(h_TD, a_RD, bias_R), b_DR) * scaling


def loreft_update(h_TD: Tensor, a_RD: Tensor, r_RD: Tensor, bias_R: Tensor) -> Tensor:
    """Returns the LoReFT update of the residual stream, to be added to it: Q^T (A h + bias - Q h).

        Q = orthonormal_rows(R);  update = (h @ (A - Q).T + bias) @ Q

    Args:
        h_TD: output of a decoder layer, (..., D), floating
        a_RD: (R, D), the paper's W
        r_RD: (R, D), full row rank; the paper's R after orthonormalisation
        bias_R: (R,)
    Returns: (..., D), a new tensor.
    Source: arXiv 2404.03592, equation 2 (LoReFT).
    """
    q_RD = orthonormal_rows(r_RD)
    return linear(linear(h_TD, a_RD - q_RD, bias_R), q_RD.T)


def orthonormal_rows(r_RD: Tensor) -> Tensor:
    """Returns Q (R, D) with orthonormal rows that span the rows of r, in r's dtype; float32 or better inside.

    Q is the transposed factor of the QR decomposition of r^T with a positive diagonal, which makes it unique: a matrix
    whose rows are orthonormal already comes back as it is, up to rounding. Rows must be linearly independent.
    """
    factor_DR, triangle_RR = torch.linalg.qr(r_RD.T.to(torch.promote_types(r_RD.dtype, torch.float32)))
    sign_R = torch.where(triangle_RR.diagonal() < 0, -1.0, 1.0)
    return (factor_DR * sign_R).T.to(r_RD.dtype)
