"""Second moments factored for feedback, with damping."""

import torch
from torch import Tensor

from ir.errors import DataError


def factored(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped `H [K, K]` and upper `U` with `UᵀU = H⁻¹`, float64. H reversed is LLᵀ, so `H = RRᵀ` with R upper, and `U = R⁻¹`.

    Args:
        gram: positive semidefinite; a zero of its diagonal becomes the mean.
        damping: share of the mean of the diagonal that is added to it; raised tenfold, up to 10, until the factorisation succeeds.

    Raises:
        DataError: it is far from positive semidefinite.
    """
    H = gram.to(torch.float64, copy=True)
    diagonal = H.diagonal().clone()
    mean = diagonal.mean().where(diagonal.sum() > 0, 1.0)
    dead = torch.where(diagonal > 0, 0.0, mean - diagonal)
    while damping <= 10:
        H.diagonal().copy_(diagonal + (dead + damping * mean))
        R, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            R = R.flip(0, 1)  # matrices of wide layers take hundreds of megabytes: none is held longer than needed
            U = torch.eye(len(H), dtype=H.dtype, device=H.device).mT  # by columns, as LAPACK wants it
            return H, torch.linalg.solve_triangular(R, U, upper=True, out=U)
        damping = max(10 * damping, 1e-6)
    raise DataError("the Gram matrix is not positive semidefinite", remedy="calibrate again")
