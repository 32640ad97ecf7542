"""Orthonormal rows of a matrix, as LoReFT uses them: on disk, in slots and in the ops."""

import torch
from torch import Tensor


def orthonormal_rows(r_RD: Tensor) -> Tensor:
    """Returns Q (R, D), whose orthonormal rows span the rows of r.

        Q.T @ triangle = r.T, with a positive diagonal of triangle

    The positive diagonal makes Q unique: rows that are orthonormal already are returned unchanged, up to rounding.
    Computed in float32 or wider.

    Args:
        r_RD: (R, D), floating point, R <= D, rows linearly independent
    Returns: (R, D), a new tensor in r's dtype.
    """
    factor_DR, triangle_RR = torch.linalg.qr(r_RD.T.to(torch.promote_types(r_RD.dtype, torch.float32)))
    sign_R = torch.where(triangle_RR.diagonal() < 0, -1.0, 1.0)
    return (factor_DR * sign_R).T.to(r_RD.dtype)
