"""A linear that reads only some of its inputs, refitted by least squares to what it gave with all of them."""

import torch
from torch import Tensor

from ir.rounding.factor import factored


def refit(
    W: Tensor, gram: Tensor, keep: Tensor, damping: float, mean: Tensor | None = None, cross: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`W' = W_K + (W G_:K − W_K G_KK) (G_KK + λI)⁻¹`: the least `E‖W x − W' x_K − b'‖² + λ‖W' − W_K‖²`, K what is kept.

    With a mean, inputs and outputs are centred, and `b' = W m − W' m` makes up for the mean of what goes.

    Args:
        W: `[N, K]`.
        gram: `G = E[x xᵀ] [K, K]`, of all inputs.
        keep: bool `[K]`, the inputs that stay.
        damping: λ, as a share of the mean of the diagonal.
        mean: `m = E[x] [K]`, if a bias may be added.

    Returns:
        `[N, K]` with zeros at inputs that go, in W's dtype, and what is added to the bias `[N]`; None without a mean.
    """
    G, wide = gram.double(), W.double()
    if mean is not None:
        G = G - torch.outer(mean.double(), mean.double())
    C = G if cross is None else cross.double()
    H, _ = factored(G[keep][:, keep], damping)
    short = wide @ C[:, keep] - wide[:, keep] @ G[keep][:, keep]
    fitted = torch.zeros_like(wide)
    fitted[:, keep] = wide[:, keep] + torch.linalg.solve(H, short.T).T
    bias = None if mean is None else ((wide - fitted) @ mean.double()).to(W.dtype)
    return fitted.to(W.dtype), bias
