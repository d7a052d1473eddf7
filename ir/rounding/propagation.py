"""The error of the compressed prefix: which weight makes up for it."""

import torch
from torch import Tensor

from ir.rounding.factor import factored


def propagate_error(W: Tensor, gram: Tensor, cross: Tensor, strength: float = 1.0, damping: float = 0.01) -> Tensor:
    """The weight to round to make up for the compressed prefix's error (QEP, 2504.09629): `W + α W δᵀX̂ (H + λI)⁻¹`, `δ = X − X̂`.

    Args:
        W: `[N, K]`.
        gram: `H = X̂ᵀX̂ [K, K]`, `X̂` from the compressed prefix.
        cross: `XᵀX̂ [K, K]`, `X` from the uncompressed model, the same tokens.
        strength: α, 0 to 1.
        damping: λ, as a share of the mean of H's diagonal.
    """
    H, _ = factored(gram, damping)
    correction: Tensor = torch.linalg.solve(H, (W.double() @ (cross - gram).double()).T).T
    return W + strength * correction.to(W.dtype)
