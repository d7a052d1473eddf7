"""Invertible transforms of blocks of channels that leave the activation and its readers the same covariance, in closed form.

A linear layer `Y = X Wᵀ` is `(X Tᵀ)(W T⁻¹)ᵀ` for any invertible `T`. With one scale a token and one an output channel, and a rotation that
spreads each row evenly, rounding errors grow with `‖X Tᵀ‖_F · ‖W T⁻¹‖_F`. The least value of that is the nuclear norm of `W Xᵀ`; for
block-diagonal `T` it is the sum of the blocks' nuclear norms, reached in closed form (the idea of WUSH, 2512.00956). Diagonal ones reach
`Σ ‖x_j‖ ‖w_j‖`, with `s_j = √(‖x_j‖ / ‖w_j‖)`.

Letters: `m` blocks of `b` channels each; `G_x`, `G_w` the blocks of `XᵀX` and `WᵀW` on the diagonal, `[m, b, b]`: nothing else of these
matrices is needed, or ever held.
"""

import torch
from torch import Tensor

from ir.errors import DataError

DAMPING = 1e-4  # of a block's mean diagonal; readers with fewer rows than b leave G_w without full rank


def moments(x: Tensor, channels: Tensor) -> Tensor:
    """The diagonal blocks of `xᵀx`, float64 `[m, b, b]`.

    Args:
        x: `[rows, n]`.
        channels: which channels each block is made of, int64 `[m, b]`.
    """
    split = x[:, channels].transpose(0, 1)
    return (split.mT @ split).double()


def in_order(n: int, block: int) -> Tensor:
    """Blocks of neighbours, int64 `[n/b, b]`: `block` divides `n`."""
    return torch.arange(n).reshape(-1, block)


def apply(blocks: Tensor, x: Tensor) -> Tensor:
    """`y = x Bᵀ` with `B` block-diagonal, `blocks [m, b, b]`, `x [..., m · b]`; in the dtype of `x`."""
    count, b, _ = blocks.shape
    split = x.reshape(-1, count, b).transpose(0, 1)
    return (split @ blocks.to(x).mT).transpose(0, 1).reshape(x.shape)


def balanced(grams_x: Tensor, grams_w: Tensor, damping: float = DAMPING) -> Tensor:
    """The transform, float64 `[m, b, b]`, after which both sides have the same second moments, and these are diagonal.

    With `G_x = L_x L_xᵀ`, `G_w = L_w L_wᵀ` per block and the singular values `L_wᵀ L_x = U S Vᵀ`: `T = S^(−½) Uᵀ L_wᵀ`. Then
    `T G_x Tᵀ = S = T⁻ᵀ G_w T⁻¹`; any orthogonal map after it keeps both equal, and a Hadamard transform spreads them evenly.

    Args:
        grams_x: blocks of `XᵀX`, positive semidefinite.
        grams_w: blocks of `WᵀW`, likewise.
        damping: added to both diagonals, as a share of the block's mean; the grams are then equal up to it. Zero needs full rank.

    Raises:
        DataError: grams that are misshapen, not finite, or that stay without full rank.
    """
    if grams_x.shape != grams_w.shape or grams_x.ndim != 3 or grams_x.shape[1] != grams_x.shape[2]:
        raise DataError(f"Gram matrices {list(grams_x.shape)} and {list(grams_w.shape)} are not the same square blocks")
    X, W = (_factor(grams, damping, name) for grams, name in ((grams_x, "the activation"), (grams_w, "the weight")))
    U, S, _ = torch.linalg.svd(W.mT @ X)
    T: Tensor = S.rsqrt().unsqueeze(-1) * (U.mT @ W.mT)
    return T


def _factor(grams: Tensor, damping: float, name: str) -> Tensor:
    """Lower `L` with `L Lᵀ = G + λI`."""
    if not torch.isfinite(grams).all():
        raise DataError(f"the Gram matrices of {name} are not finite")
    grams = grams.double()
    mean = grams.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    mean = torch.where(mean > 0, mean, 1.0)  # a block that no input reaches
    L, failed = torch.linalg.cholesky_ex(grams + damping * mean[:, None, None] * eye)
    if failed.any():
        raise DataError(f"a block of {name}'s Gram matrix has no full rank", remedy="calibrate on more tokens, or raise the damping")
    factor: Tensor = L
    return factor
