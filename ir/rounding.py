"""Rounding of weights: codes and scales, to nearest or with the least error of the layer's output.

For a linear layer `Y = X Wᵀ` the output's squared error is `tr(ΔW H ΔWᵀ)`, `ΔW = W − Ŵ`, with the Gram matrix `H = XᵀX [K, K]`.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding, Float
from ir.errors import DataError, OptionError
from ir.numerics import QParams

SCALE_DTYPE = torch.float16  # scales of weights are stored, and counted, in 16 bits
RATIOS = tuple(1 - 0.025 * i for i in range(25))  # clipping ratios that are tried, 1 to 0.4; two bits use the least of them
_BLOCK = 128  # columns of a descent between two updates of the rest of their group


class Rounding(Protocol):
    """Codes `[N, K]` of a weight as `numerics` states them, and their parameters with float16 scales; `gram` is `XᵀX [K, K]`.

    Raises:
        DataError: a weight or Gram matrix that is missing, misshapen or not finite.
    """

    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]: ...  # noqa: D102 - above


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest code; `search` chooses scales by `search_qparams`, weighted by the diagonal of `gram`, if any."""

    search: bool = False

    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        W = _checked(W, gram)
        importance = torch.ones_like(W[0]) if gram is None else gram.diagonal().float()
        qparams = _choose(W, encoding, importance, self.search)
        return numerics.quantize(W, qparams, encoding), qparams


@dataclass(frozen=True)
class GPTQ:
    """Round column by column, each error made up for by the columns still free; then descend on codes and scales together.

    GPTQ (2210.17323): with `U` upper and `UᵀU = (H + λI)⁻¹`, `e = (w_j − ŵ_j)/U_jj`, `w_i −= e U_ji` for `i > j`. The parameters of a group
    are chosen when it is reached, from the weights as updated by then. `search` weighs the error of column j by `1/U_jj²`: what it costs
    after all later columns have made up for it. The sweeps are `descend`. Columns that no input reaches are rounded to nearest.

    Args:
        damping: λ, as a share of the mean of H's diagonal; raised tenfold, up to 10, until the factorisation succeeds.
        act_order: columns in falling order of H's diagonal; the groups' parameters are then chosen beforehand, from `W`.
        block: columns between two updates of all that follow; affects speed only.
        search: choose scales by `search_qparams` instead of covering the extremes.
        sweeps: passes of coordinate descent after GPTQ, each about as long as GPTQ itself.
    """

    damping: float = 0.01
    act_order: bool = False
    block: int = 128
    search: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        if self.damping < 0 or self.block < 1 or self.sweeps < 0:
            raise OptionError("damping and sweeps are at least 0, block at least 1", where=str(self))

    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]:
        """See `Rounding`; a Gram matrix is needed."""
        W = _checked(W, gram)
        if gram is None:
            raise DataError("GPTQ needs the Gram matrix of the layer's inputs", remedy="give calibration text, or round to nearest")
        order = gram.diagonal().argsort(descending=True, stable=True) if self.act_order else torch.arange(len(gram), device=gram.device)
        H, U = (matrix.float() for matrix in _factored(gram[order][:, order], self.damping))
        draft = self._round_columns(W, encoding, order, U)
        back = order.argsort()
        return descend(W, draft.codes.T, draft.qparams, encoding, H[back][:, back], sweeps=self.sweeps)

    def _round_columns(self, W: Tensor, encoding: Encoding, order: Tensor, U: Tensor) -> "_Draft":
        """GPTQ proper: round the columns in `order`; `U [K, K]` in that order too."""
        importance, columns = U.diagonal() ** -2, order.tolist()
        V = W.T[order].contiguous()  # [K, N]: the columns not yet rounded, updated
        codes = torch.empty(V.shape, dtype=numerics.storage_dtype(encoding), device=V.device)
        draft = _Draft(encoding, codes, _choose(W, encoding, importance[order.argsort()], self.search and self.act_order))
        g = draft.group
        for start, end in _spans(len(V), len(V) if self.act_order else g, self.block):
            errors = torch.empty_like(V[start:end])
            for j in range(start, end):
                if not self.act_order and j % g == 0:
                    draft.set_group(j // g, _choose(V[j : j + g].T, encoding, importance[j : j + g], self.search))
                e = errors[j - start] = (V[j] - draft.round(columns[j], V[j])) / U[j, j]
                V[j + 1 : end].addr_(U[j, j + 1 : end], e, alpha=-1)
            V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
        return draft


def propagate_error(W: Tensor, gram: Tensor, cross: Tensor, strength: float = 1.0, damping: float = 0.01) -> Tensor:
    """The weight to round to make up for the compressed prefix's error (QEP, 2504.09629): `W + α W δᵀX̂ (H + λI)⁻¹`, `δ = X − X̂`.

    Args:
        W: `[N, K]`.
        gram: `H = X̂ᵀX̂ [K, K]`, `X̂` from the compressed prefix.
        cross: `XᵀX̂ [K, K]`, `X` from the uncompressed model, the same tokens.
        strength: α, 0 to 1.
        damping: λ, as a share of the mean of H's diagonal.
    """
    H, _ = _factored(gram, damping)
    correction: Tensor = torch.linalg.solve(H, (W.double() @ (cross - gram).double()).T).T
    return W + strength * correction.to(W.dtype)


def descend(W: Tensor, codes: Tensor, qparams: QParams, encoding: Encoding, H: Tensor, *, sweeps: int) -> tuple[Tensor, QParams]:
    """Codes and scales with a smaller `tr(ΔW H ΔWᵀ)`, by exact coordinate descent.

    In every group, each column in turn takes the code nearest to its optimum with all others fixed, `ŵ_j + (ΔW H)_j / H_jj`; then the group
    takes its best scale for these codes, `s + qᵀ(HΔWᵀ) / qᵀHq` (the exact scales of 2606.10890, one group at a time). No step raises the
    error; zero points stay. `W` and `codes` are `[N, K]` and not changed, `H` is float32 `[K, K]` with a positive diagonal.
    """
    draft = _Draft(encoding, codes.T.clone(memory_format=torch.contiguous_format), replace(qparams, scale=qparams.scale.clone()))
    g = draft.group
    V_hat = numerics.dequantize(codes, qparams, encoding).T.contiguous()
    for _ in range(sweeps):
        P = H @ (W.T - V_hat)  # −½ gradient, [K, N]
        for start in range(0, len(H), g):
            span = slice(start, start + g)
            group, old = (V_hat[span], P[span], H[span, span]), V_hat[span].clone()
            _descend_codes(draft, *group, start)
            _fit_scale(draft, *group, start // g)
            step = V_hat[span] - old
            P[:start].addmm_(H[:start, span], step, alpha=-1)
            P[start + g :].addmm_(H[start + g :, span], step, alpha=-1)
    return draft.codes.T.contiguous(), draft.qparams


def _descend_codes(draft: "_Draft", V_hat: Tensor, P: Tensor, H: Tensor, start: int) -> None:
    """One pass over the columns of one group `[columns, N]`; keeps `P` of the group's own columns right."""
    for first in range(0, len(H), _BLOCK):
        block = slice(first, first + _BLOCK)
        v, p, h = V_hat[block].clone(), P[block].clone(), H[block, block]
        for j in range(len(h)):
            new = draft.round(start + first + j, v[j] + p[j] / h[j, j])
            p.addr_(h[j], new - v[j], alpha=-1)
            v[j] = new
        P.addmm_(H[:, block], v - V_hat[block], alpha=-1)
        V_hat[block] = v


def _fit_scale(draft: "_Draft", V_hat: Tensor, P: Tensor, H: Tensor, group: int) -> None:
    """Give one group its best scales, and keep `V_hat` and `P` of its own columns right."""
    z, g = draft.at(group).zero_point, draft.group
    q = draft.codes[group * g : (group + 1) * g].float() - (0 if z is None else z)
    scale = draft.qparams.scale[:, group]
    rows = torch.arange(q.shape[1], device=q.device) // draft.encoding.block_shape((q.shape[1], g))[0]
    slope, curvature = (torch.zeros_like(scale, dtype=torch.float32).index_add(0, rows, (q * x).sum(0)) for x in (P, H @ q))
    best = scale.float() + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    draft.qparams.scale[:, group] = torch.where(curvature > 0, best.clamp(numerics.TINY_HALF, 65504.0), scale).to(SCALE_DTYPE)
    step = q * draft.at(group).scale - V_hat
    P.addmm_(H, step, alpha=-1)
    V_hat += step


def _choose(W: Tensor, encoding: Encoding, importance: Tensor, search: bool) -> QParams:
    """Parameters of the blocks of `W [N, columns]`, searched for or from the extremes."""
    return search_qparams(W, encoding, importance) if search else numerics.choose_qparams(W, encoding, SCALE_DTYPE)


def search_qparams(W: Tensor, encoding: Encoding, importance: Tensor) -> QParams:
    """Parameters, per block of `W [N, K]`, of the clipping ratio in `RATIOS` with the least `Σ importance · (w − ŵ)²`.

    The extremes' own are among those tried; one bit and floats, which gain nothing by clipping, keep them. `importance` is `[K]`, ≥ 0.
    """
    if encoding.bits == 1 or isinstance(encoding.format, Float):
        return numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    split, axes = numerics.blocked(W, encoding)
    low, high = split.amin(axes).clamp_max(0), split.amax(axes).clamp_min(0)

    def error(qparams: QParams) -> Tensor:
        squared = (W - numerics.fake_quantize(W, encoding, qparams)).square() * importance
        return numerics.blocked(squared, encoding)[0].sum(axes)

    best = numerics.qparams_from_range(low, high, encoding, SCALE_DTYPE)
    least = error(best)
    for ratio in RATIOS[1:]:
        tried = numerics.qparams_from_range(low * ratio, high * ratio, encoding, SCALE_DTYPE)
        found = error(tried)
        better, least = found < least, torch.minimum(found, least)
        z, z_tried = best.zero_point, tried.zero_point
        zero_point = None if z is None or z_tried is None else torch.where(better, z_tried, z)
        best = QParams(torch.where(better, tried.scale, best.scale), zero_point)
    return best


@dataclass
class _Draft:
    """Codes `[K, N]`, transposed so that a column of the weight lies together, and parameters, while both are being chosen."""

    encoding: Encoding
    codes: Tensor
    qparams: QParams

    def __post_init__(self) -> None:
        self.group = self.encoding.block_shape((self.codes.shape[1], self.codes.shape[0]))[1]
        self.single = replace(self.encoding, block=(1,))

    def set_group(self, group: int, chosen: QParams) -> None:
        """Store the parameters of one group, as chosen from its columns."""
        self.qparams.scale[:, group] = chosen.scale[:, 0]
        if self.qparams.zero_point is not None and chosen.zero_point is not None:
            self.qparams.zero_point[:, group] = chosen.zero_point[:, 0]

    def at(self, group: int) -> QParams:
        """The parameters of one group, `[N]` or `[1]`."""
        rows = (self.codes.shape[1], 1)
        scale = numerics.expand(self.qparams.scale[:, group, None], self.encoding, rows)[:, 0]
        z = self.qparams.zero_point
        return QParams(scale, None if z is None else numerics.expand(z[:, group, None], self.encoding, rows)[:, 0])

    def round(self, column: int, values: Tensor) -> Tensor:
        """Store the codes of one column's `values [N]`; returns what they stand for."""
        parameters = self.at(column // self.group)
        self.codes[column] = numerics.quantize(values, parameters, self.single)
        return numerics.dequantize(self.codes[column], parameters, self.single)


def _spans(K: int, group: int, block: int) -> list[tuple[int, int]]:
    """Blocks of columns within one group or of whole groups, so that a group is up to date where it starts."""
    whole = block // group * group if group <= block else group
    return [(i, min(i + block, a + whole, K)) for a in range(0, K, whole) for i in range(a, min(a + whole, K), block)]


def _factored(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped `H` and upper `U` with `UᵀU = H⁻¹`, float64. H reversed is LLᵀ, so `H = RRᵀ` with R upper, and `U = R⁻¹`."""
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


def _checked(W: Tensor, gram: Tensor | None) -> Tensor:
    """`W` in float32, if it and the Gram matrix can be used."""
    if W.ndim != 2 or not torch.isfinite(W).all():
        raise DataError(f"a weight to round is a matrix of finite numbers, and this {list(W.shape)} is not")
    if gram is not None and (gram.shape != (W.shape[1], W.shape[1]) or not torch.isfinite(gram).all()):
        raise DataError(f"a weight of {W.shape[1]} columns needs a finite Gram matrix of that size, not this {list(gram.shape)}")
    return W.detach().float()
