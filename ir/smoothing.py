"""Channel scales between an activation and the linears that read it: policies, their grids, and the error that they leave.

Letters: `X [tokens, in]`, `W [out, in]`, `Y = X Wᵀ`, `s [in]` positive, `Λ = diag(s)`, `H` an orthonormal Hadamard matrix. Then
`X̂ = X Λ⁻¹ Hᵀ` and `Ŵ = W Λ Hᵀ` have the same product as `X` and `W`. Several linears that read one tensor are one `W`, row on row.
Sources: SmoothQuant 2211.10438 (max), AWQ 2306.00978 (mean), SmoothRot 2506.05413 (rotation after), 2606.09927 (quantiles).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ir.encoding import Encoding, Int
from ir.errors import DataError, OptionError
from ir.hadamard import largest_block, transform
from ir.statistics import TensorStatistics
from ir.straight_through import clip_shape, fake_quantize

LEAST = 1e-5  # no scale is smaller
Statistic = float | Literal["mean"]  # a quantile of |x|, 1 being its maximum, or its mean


@dataclass(frozen=True, order=True)
class Policy:
    """How scales follow from data: `s = a^α / w^(1−α)`, `a` the statistic `q` of |X|, `w` the greatest |W|, per channel."""

    alpha: float = 0.5
    q: float | Literal["mean"] = 1.0


def magnitude(x: Tensor | TensorStatistics, q: Statistic = 1.0) -> Tensor:
    """The `q`-quantile, or the mean, of |x| per channel, `[in]`.

    Args:
        x: tokens `[..., in]`, then the result is exact (as `torch.quantile`, for any number of tokens); or statistics with a sketch, then a
            quantile below 1 and the mean are as near as `ir.sketch` says.
        q: in [0, 1], or "mean".

    Raises:
        OptionError: `q` is neither.
        DataError: no tokens, or statistics without the sketch that `q` needs.
    """
    if q != "mean" and not (isinstance(q, float | int) and 0 <= q <= 1):
        raise OptionError(f"the statistic of a scale is a quantile in [0, 1] or 'mean', not {q!r}")
    if isinstance(x, TensorStatistics):
        if q == 1:
            return x.absmax
        if x.sketch is None:
            raise DataError(f"the statistic {q!r} of |x| needs a sketch of its quantiles", remedy="observe with sketch=True")
        return x.sketch.mean() if q == "mean" else x.sketch.quantile(q)
    x = x.detach().reshape(-1, x.shape[-1]).abs()
    if len(x) == 0:
        raise DataError("scales need at least one token")
    if q == "mean":
        return x.mean(0)
    if q == 1:
        return x.amax(0)
    rank = q * (len(x) - 1)
    below = int(rank)
    columns = x.T.contiguous()
    low, high = (columns.kthvalue(min(k, len(x) - 1) + 1, 1).values for k in (below, below + 1))
    return torch.lerp(low, high, rank - below)


def weight_magnitude(weights: Tensor | Sequence[Tensor]) -> Tensor:
    """The greatest |W| per input channel over the rows of all readers, `[in]`."""
    weights = [weights] if isinstance(weights, Tensor) else weights
    return torch.stack([W.detach().abs().amax(0) for W in weights]).amax(0)


def scales(activation: Tensor, weight: Tensor, alpha: float, *, normalised: bool = False) -> Tensor:
    """`s_j = a_j^α / w_j^(1−α)`, at least 1e-5; 1 where `a_j` or `w_j` is zero.

    AWQ's `s = mean|X|^β` is `scales(magnitude(X, "mean"), torch.ones(in), β)`.

    Args:
        activation: `a [in]`, see `magnitude`.
        weight: `w [in]`, see `weight_magnitude`.
        alpha: the share of the range that moves from the activation to the weight.
        normalised: divide by the geometric mean. The error does not see a common factor (per-token and per-channel scales absorb it),
            but the size of the numbers in between does.

    Raises:
        DataError: the two differ in shape, or are negative or not finite.
    """
    if activation.shape != weight.shape or activation.ndim != 1:
        raise DataError(f"magnitudes of shape {list(activation.shape)} and {list(weight.shape)} are not of the same channels")
    both = torch.stack([activation, weight.to(activation)])
    if not torch.isfinite(both).all() or (both < 0).any():
        raise DataError("magnitudes of channels are finite and at least 0", remedy="look at the calibration input and the weight")
    a, w = both.clamp_min(torch.finfo(both.dtype).tiny).log()
    live = (both > 0).all(0)
    s = torch.where(live, (alpha * a - (1 - alpha) * w).exp().clamp_min(LEAST), 1.0)
    return centred(s) if normalised else s


def centred(s: Tensor) -> Tensor:
    """`s` over its geometric mean."""
    return (s.log() - s.log().mean()).exp()


def rounded(x: Tensor, bits: int | None, clip: Tensor | float = 1.0) -> Tensor:
    """`x [rows, columns]` after symmetric quantization with one scale a row, with a gradient; see `ir.straight_through`.

    Args:
        bits: 2 to 8; None rounds nothing.
        clip: ratio of the greatest magnitude that is kept, a number or one a row.
    """
    if bits is None:
        return x
    encoding = Encoding(Int(bits), (1, -1))
    if isinstance(clip, Tensor) and clip.numel() > 1:
        clip = clip.reshape(clip_shape(tuple(x.shape), encoding))
    return fake_quantize(x, encoding, clip)


def transformed(X: Tensor, W: Tensor, s: Tensor | None = None, hadamard: bool = True) -> tuple[Tensor, Tensor]:
    """`X̂` and `Ŵ`, differentiable in `s`; no `s` is `s = 1`. Where no Hadamard matrix has the whole order, the largest block's is used."""
    if s is not None:
        X, W = X / s, W * s
    if hadamard:
        block = largest_block(X.shape[-1])
        X, W = transform(X, block), transform(W, block)
    return X, W


def layer_error(
    X: Tensor,
    W: Tensor,
    s: Tensor | None = None,
    bits_x: int | None = 4,
    bits_w: int | None = 4,
    hadamard: bool = True,
    clip_x: Tensor | float = 1.0,
    clip_w: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The layer's error, as scalar tensors: `E = ‖Y − Ŷ‖_F` and `Ẽ = E / ‖Y‖_F`, with `Ŷ = Q(X̂) Q(Ŵ)ᵀ`.

    Activations have one dynamic scale a token, weights one an output channel, both symmetric by this library's convention
    `max / (2^(b−1) − ½)`: the range ends half a step above the greatest code, 7 % finer steps at 4 bits than the papers'
    `max / (2^(b−1) − 1)`, which wastes the lowest code.

    Args:
        X: `[tokens, in]`.
        W: `[out, in]`; several readers' rows concatenated.
        s: `[in]`; 1 if None.
        bits_x: 2 to 8; None leaves the activation as it is.
        bits_w: likewise.
        hadamard: rotate after scaling.
        clip_x: ratio of each token's maximum that is kept.
        clip_w: ratio of each output channel's, a number or `[out]`.
    """
    X_hat, W_hat = transformed(X, W, s, hadamard)
    return output_error(X @ W.T, rounded(X_hat, bits_x, clip_x) @ rounded(W_hat, bits_w, clip_w).T)


def output_error(Y: Tensor, Y_hat: Tensor) -> tuple[Tensor, Tensor]:
    """`E = ‖Y − Ŷ‖_F` and `Ẽ = E / (‖Y‖_F + ε)`."""
    E = (Y - Y_hat).norm()
    return E, E / (Y.norm() + 1e-12)


N1 = tuple(Policy(round(0.25 + 0.025 * i, 3), 1.0) for i in range(21))
N2 = tuple(Policy(0.5, 1.0 if i == 15 else 1 - 0.05 * 0.01 ** (i / 15)) for i in range(16))  # 1 − geomspace(0.05, 5e-4, 16), the last one 1


def product(alphas: Iterable[float], qs: Iterable[Statistic]) -> tuple[Policy, ...]:
    """N3: every strength with every statistic."""
    qs = list(qs)
    return tuple(Policy(alpha, q) for alpha in alphas for q in qs)
