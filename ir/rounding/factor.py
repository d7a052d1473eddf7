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
    H = gram.double()
    mean = H.diagonal().mean().where(H.diagonal().sum() > 0, 1.0)
    dead = torch.where(H.diagonal() > 0, 0.0, mean - H.diagonal())
    while damping <= 10:
        damped = H + torch.diag(dead + damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return damped, torch.linalg.solve_triangular(L.flip(0, 1), torch.eye(len(H), dtype=H.dtype, device=H.device), upper=True)
        damping = max(10 * damping, 1e-6)
    raise DataError("the Gram matrix is not positive semidefinite", remedy="calibrate again")
