"""Second moments factored for feedback, with damping."""

import torch
from torch import Tensor

from ir.errors import DataError

COLUMNS = 512  # that an inverse is solved for at a time


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
        L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            R = L.flip(0, 1)
            del L  # these matrices are what rounding holds most of
            return H, _inverse(R)
        damping = max(10 * damping, 1e-6)
    raise DataError("the Gram matrix is not positive semidefinite", remedy="calibrate again")


def _inverse(R: Tensor) -> Tensor:
    """Of an upper triangular matrix, some columns at a time; those of a leading block depend on this alone."""
    U = torch.zeros_like(R)
    for start in range(0, len(R), COLUMNS):
        end = min(start + COLUMNS, len(R))
        identity = torch.zeros(end, end - start, dtype=R.dtype, device=R.device)
        identity[start:].fill_diagonal_(1)
        U[:end, start:end] = torch.linalg.solve_triangular(R[:end, :end], identity, upper=True)
    return U
