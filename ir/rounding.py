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

SCALE_DTYPE = torch.float16
RATIOS = tuple(1 - 0.025 * i for i in range(25))  # clipping ratios that are tried, 1 to 0.4; two bits use the least of them


class Rounding(Protocol):
    """A way to round a weight."""

    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]:
        """Codes `[N, K]` of `W [N, K]` as `numerics` states them, and their parameters with float16 scales; `gram` is `XᵀX [K, K]`.

        Raises:
            DataError: a weight or Gram matrix that is missing, misshapen or not finite.
        """
        ...


@dataclass(frozen=True)
class Nearest:
    """Round every weight to the nearest code; `search` chooses scales by `search_qparams`, weighted by the Gram matrix's diagonal, if any."""

    search: bool = False

    def round_weight(self, W: Tensor, encoding: Encoding, gram: Tensor | None = None) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        W = _checked(W, gram)
        importance = torch.ones_like(W[0]) if gram is None else gram.diagonal().float()
        qparams = search_qparams(W, encoding, importance) if self.search else numerics.choose_qparams(W, encoding, SCALE_DTYPE)
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
        draft = _Draft.empty(W, encoding)
        self._round_columns(draft, W, order, U)
        back = order.argsort()
        return descend(W, draft.codes.T, draft.qparams, encoding, H[back][:, back], sweeps=self.sweeps)

    def _round_columns(self, draft: "_Draft", W: Tensor, order: Tensor, U: Tensor) -> None:
        """GPTQ proper: fill `draft`, in `order`; `U [K, K]` in that order too."""
        importance, columns, g = U.diagonal() ** -2, order.tolist(), draft.group
        if self.act_order:
            draft.set_groups(0, self._choose(W, draft.encoding, importance[order.argsort()]))
        V = W.T[order].contiguous()  # [K, N]: the columns not yet rounded, updated
        for start, end in _spans(len(V), len(V) if self.act_order else g, self.block):
            errors = torch.empty_like(V[start:end])
            for j in range(start, end):
                if not self.act_order and j % g == 0:
                    draft.set_groups(j // g, self._choose(V[j : j + g].T, draft.encoding, importance[j : j + g]))
                e = errors[j - start] = (V[j] - draft.round(columns[j], V[j])) / U[j, j]
                V[j + 1 : end].addr_(U[j, j + 1 : end], e, alpha=-1)
            V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)

    def _choose(self, W: Tensor, encoding: Encoding, importance: Tensor) -> QParams:
        """Parameters of the blocks of `W [N, columns]`."""
        return search_qparams(W, encoding, importance) if self.search else numerics.choose_qparams(W, encoding, SCALE_DTYPE)


def descend(W: Tensor, codes: Tensor, qparams: QParams, encoding: Encoding, H: Tensor, *, sweeps: int) -> tuple[Tensor, QParams]:
    """Codes and scales with a smaller `tr(ΔW H ΔWᵀ)`, by exact coordinate descent.

    In every group, each column in turn takes the code nearest to its optimum with all others fixed, `ŵ_j + (ΔW H)_j / H_jj`; then the group
    takes its best scale for these codes, `s + qᵀ(HΔWᵀ) / qᵀHq` (the exact scales of 2606.10890, one group at a time). No step raises the error.

    Zero points stay. `W` and `codes` are `[N, K]` and not changed, `H` is float32 `[K, K]` with a positive diagonal.
    """
    draft = _Draft(encoding, codes.T.clone(memory_format=torch.contiguous_format), replace(qparams, scale=qparams.scale.clone()))
    g = draft.group
    V_hat = numerics.dequantize(codes, qparams, encoding).T.contiguous()
    for _ in range(sweeps):
        P = H @ (W.T - V_hat)  # −½ gradient, [K, N]
        for start in range(0, len(H), g):
            span = slice(start, start + g)
            old, H_g = V_hat[span].clone(), H[span, span]
            _descend_codes(draft, V_hat[span], P[span], H_g, start)
            P[span] -= H_g @ _fit_scale(draft, V_hat[span], P[span], H_g, start // g)
            step = V_hat[span] - old
            P[:start].addmm_(H[:start, span], step, alpha=-1)
            P[start + g :].addmm_(H[start + g :, span], step, alpha=-1)
    return draft.codes.T.contiguous(), draft.qparams


def _descend_codes(draft: "_Draft", V_hat: Tensor, P: Tensor, H: Tensor, start: int) -> None:
    """One pass over the columns of one group `[columns, N]`; keeps `P` of the group's own columns right."""
    for j in range(len(H)):
        new = draft.round(start + j, V_hat[j] + P[j] / H[j, j])
        P.addr_(H[j], new - V_hat[j], alpha=-1)
        V_hat[j] = new


def _fit_scale(draft: "_Draft", V_hat: Tensor, P: Tensor, H: Tensor, group: int) -> Tensor:
    """Give one group its best scales; returns the change of `V_hat [columns, N]`."""
    parameters, g = draft.at(group), draft.group
    q = draft.codes[group * g : (group + 1) * g].float()
    if parameters.zero_point is not None:
        q = q - parameters.zero_point
    scale = draft.qparams.scale[:, group]
    rows = torch.arange(q.shape[1], device=q.device) // draft.encoding.block_shape((q.shape[1], g))[0]
    slope, curvature = (torch.zeros_like(scale, dtype=torch.float32).index_add(0, rows, (q * x).sum(0)) for x in (P, H @ q))
    best = scale.float() + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    draft.qparams.scale[:, group] = torch.where(curvature > 0, best.clamp(numerics.TINY_HALF, 65504.0), scale).to(SCALE_DTYPE)
    step = q * draft.at(group).scale - V_hat
    V_hat += step
    return step


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
        zero_point = best.zero_point
        if zero_point is not None and tried.zero_point is not None:
            zero_point = torch.where(better, tried.zero_point, zero_point)
        best = QParams(torch.where(better, tried.scale, best.scale), zero_point)
    return best


def propagate_error(W: Tensor, gram: Tensor, cross: Tensor, strength: float = 1.0, damping: float = 0.01) -> Tensor:
    """The weight to round to make up for the compressed prefix's error (QEP, 2504.09629): `W + α W δᵀX̂ (H + λI)⁻¹`, `δ = X − X̂`.

    `gram` is `H = X̂ᵀX̂ [K, K]`, `X̂` from the compressed prefix; `cross` is `XᵀX̂ [K, K]`, `X` from the uncompressed model, the same tokens.
    `strength` is α, 0 to 1; `damping` is λ as a share of the mean of H's diagonal.
    """
    H, _ = _factored(gram, damping)
    drift = W.double() @ (cross - gram).double()
    correction: Tensor = torch.linalg.solve(H, drift.T).T
    return W + strength * correction.to(W.dtype)


def output_error(W: Tensor, codes: Tensor, qparams: QParams, encoding: Encoding, gram: Tensor) -> Tensor:
    """The output's squared error `(ΔW H ΔWᵀ)_nn` per row, float64 `[N]`."""
    D = W.double() - numerics.dequantize(codes, qparams, encoding, torch.float64)
    return (D @ gram.double() * D).sum(1)


@dataclass
class _Draft:
    """Codes `[K, N]`, transposed so that a column of the weight lies together, and parameters, while both are being chosen."""

    encoding: Encoding
    codes: Tensor
    qparams: QParams

    def __post_init__(self) -> None:
        self.group = self.encoding.block_shape((self.codes.shape[1], self.codes.shape[0]))[1]
        self.single = replace(self.encoding, block=(1,))

    @classmethod
    def empty(cls, W: Tensor, encoding: Encoding) -> "_Draft":
        codes = torch.empty(W.T.shape, dtype=numerics.storage_dtype(encoding), device=W.device)
        scale = torch.ones(encoding.scale_shape(tuple(W.shape)), dtype=SCALE_DTYPE, device=W.device)
        return cls(encoding, codes, QParams(scale, None if encoding.symmetric else torch.zeros_like(scale, dtype=torch.uint8)))

    def set_groups(self, first: int, chosen: QParams) -> None:
        """Store the parameters of the groups from `first` on."""
        for kept, new in ((self.qparams.scale, chosen.scale), (self.qparams.zero_point, chosen.zero_point)):
            if kept is not None and new is not None:
                kept[:, first : first + new.shape[1]] = new

    def at(self, group: int) -> QParams:
        """The parameters of one group, `[N]` or `[1]`."""
        rows = (self.codes.shape[1], 1)
        scale = numerics.expand(self.qparams.scale[:, group, None], self.encoding, rows)[:, 0]
        if self.qparams.zero_point is None:
            return QParams(scale)
        return QParams(scale, numerics.expand(self.qparams.zero_point[:, group, None], self.encoding, rows)[:, 0])

    def round(self, column: int, values: Tensor) -> Tensor:
        """Store the codes of one column's `values [N]`; returns what they stand for."""
        parameters = self.at(column // self.group)
        self.codes[column] = numerics.quantize(values, parameters, self.single)
        return numerics.dequantize(self.codes[column], parameters, self.single)


def _spans(K: int, group: int, block: int) -> list[tuple[int, int]]:
    """Blocks of columns within one group or of whole groups, so that a group is up to date where it starts."""
    whole = block // group * group if group <= block else group
    inner = min(whole, block)
    return [(i, min(i + inner, a + whole, K)) for a in range(0, K, whole) for i in range(a, min(a + whole, K), inner)]


def _factored(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped `H` and upper `U` with `UᵀU = H⁻¹`, float64. H reversed is LLᵀ, so `H = RRᵀ` with R upper, and `U = R⁻¹`."""
    H = gram.double()
    diagonal = H.diagonal()
    mean = diagonal.mean() if diagonal.sum() > 0 else torch.ones_like(diagonal[0])
    dead = torch.where(diagonal > 0, 0.0, mean - diagonal)
    while damping <= 10:
        damped = H + torch.diag(dead + damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
            return damped, torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True)
        damping = max(10 * damping, 1e-6)
    raise DataError("the Gram matrix is not positive semidefinite", remedy="calibrate again")


def _checked(W: Tensor, gram: Tensor | None) -> Tensor:
    """`W` in float32, if it and the Gram matrix can be used."""
    if W.ndim != 2 or not torch.isfinite(W).all():
        raise DataError(f"a weight to round is a matrix of finite numbers, and this {list(W.shape)} is not")
    if gram is not None and (gram.shape != (W.shape[1], W.shape[1]) or not torch.isfinite(gram).all()):
        raise DataError(f"a weight of {W.shape[1]} columns needs a finite Gram matrix of that size, not this {list(gram.shape)}")
    return W.detach().float()
