"""A linear that reads only some of its inputs, refitted by least squares to what it gave with all of them."""

import torch
from torch import Tensor

from ir.rounding.factor import factored


def refit(W: Tensor, gram: Tensor, keep: Tensor, damping: float, mean: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`W' = W_K + W_D G_DK (G_KK + λI)⁻¹`: the least `E‖W x − W' x_K − b'‖² + λ‖W' − W_K‖²`, K what is kept, D what is dropped.

    With a mean, inputs and outputs are centred, and `b' = W m − W' m_K` makes up for the mean of what is dropped.

    Args:
        W: `[N, K + D]`.
        gram: `G = E[x xᵀ]`, of all inputs.
        keep: bool, the inputs that stay.
        damping: λ, as a share of the mean of the diagonal.
        mean: `m = E[x]`, if a bias may be added.

    Returns:
        `[N, K + D]` with zeros at inputs that are dropped, in W's dtype, and what is added to the bias `[N]`, float64; None without a mean.
    """
    G, wide = gram.double(), W.double()
    if mean is not None:
        G = G - torch.outer(mean.double(), mean.double())
    fitted = torch.where(keep, wide, 0.0)
    if not keep.all():
        H, _ = factored(G[keep][:, keep], damping)
        fitted[:, keep] += torch.linalg.solve(H, (wide[:, ~keep] @ G[~keep][:, keep]).T).T
    return fitted.to(W.dtype), None if mean is None else (wide - fitted) @ mean.double()
