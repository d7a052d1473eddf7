"""What tests of rounding share: weights, correlated inputs, and the errors that methods minimise."""

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import Evidence

ENCODINGS = [
    *(f"{letter}{bits}[1,16]" for letter in "iu" for bits in (2, 3, 4, 8)),
    "i5[1,-1]",
    "u6[1,-1]",
    "i4[-1]",
    "u3[-1]",
    "u4[4,16]",
    "i7[5,-1]",
]
FEW = ["i2[1,16]", "u3[1,16]", "i5[1,-1]", "u4[4,16]", "u3[-1]"]
ODD = ["i1[1,16]", "f8e4m3[1,-1]", "f8e5m2[1,16]"]


def weight(N: int = 12, K: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def inputs(K: int = 40, tokens: int = 200, seed: int = 1) -> Tensor:
    """Correlated channels of unequal size, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.4 * torch.randn(K, K, generator=generator)
    return (torch.randn(tokens, K, generator=generator) @ mix + 0.3) * torch.linspace(0.2, 2, K)[torch.randperm(K, generator=generator)]


def gram(K: int = 40, seed: int = 1) -> Tensor:
    X = inputs(K, seed=seed)
    return X.T @ X


def output_error(W: Tensor, codes: Tensor, qparams: numerics.QParams, encoding: Encoding, H: Tensor) -> Tensor:
    D = W.double() - numerics.dequantize(codes, qparams, encoding, torch.float64)
    return (D @ H.double() * D).sum(1)


def error(rounding, encoding: Encoding, W: Tensor, H: Tensor) -> float:
    codes, qparams = rounding.round_weight(W, encoding, Evidence(gram=H))
    return float(output_error(W, codes, qparams, encoding, H).sum())


def outputs_error(W: Tensor, codes: Tensor, qparams: numerics.QParams, encoding: Encoding, X: Tensor, X_hat: Tensor) -> float:
    """`‖X Wᵀ − X̂ Ŵᵀ‖²`."""
    W_hat = numerics.dequantize(codes, qparams, encoding, torch.float64)
    return float((X.double() @ W.double().T - X_hat.double() @ W_hat.T).square().sum())


def compressed(K: int = 40, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Inputs from the model as it was, and from a compressed prefix."""
    X = inputs(K, tokens)
    return X, X + 0.3 * inputs(K, tokens, seed=5)
