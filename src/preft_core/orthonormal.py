"""Orthonormal rows, which LoReFT weights stand for: on disk, in slots and in the ops."""

import torch
from torch import Tensor


def orthonormal_rows(r_RD: Tensor) -> Tensor:
    """Returns Q (R, D) with orthonormal rows that span the rows of r, in r's dtype; float32 or better inside.

    Q is the transposed factor of the QR decomposition of r^T with a positive diagonal, which makes it unique: a matrix
    whose rows are orthonormal already comes back as it is, up to rounding. Rows must be linearly independent.
    """
    factor_DR, triangle_RR = torch.linalg.qr(r_RD.T.to(torch.promote_types(r_RD.dtype, torch.float32)))
    sign_R = torch.where(triangle_RR.diagonal() < 0, -1.0, 1.0)
    return (factor_DR * sign_R).T.to(r_RD.dtype)
