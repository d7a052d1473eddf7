"""YAQA: feedback over rows and columns, against the Fisher information of the whole model."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.numerics import QParams
from ir.rounding.descent import descend
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.factor import factored
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import Grid


@dataclass(frozen=True)
class YAQA(Rounding):
    """Round with feedback over rows and columns, least `tr(H_out ΔW H_in ΔWᵀ)`: the model's KL as a Kronecker pair sees it.

    YAQA (2505.22988, sketch B): `H_in = E[GᵀG]`, `H_out = E[GGᵀ]` of per-sequence gradients `G [N, K]` of the log likelihood. With
    `U_outᵀU_out = H_out⁻¹` and `U_in` likewise, `ΔW = U_outᵀ E U_in` and the objective is `‖E‖²`; entry (i, j) takes the code nearest
    to `w_ij − Σ U_out,ki E_kl U_in,lj`, over what is above and to the left of it. Scales are those that GPTQ finds with `H_in`, and the
    better of both results is kept. The sweeps, not in the paper, are `descend` for a few rows at a time, with all other rows fixed, towards
    `ŵ_R + D⁻¹ (H_out ΔW)_R` with the sums D of the rows of `|H_out,RR|`, which bound that matrix; no step raises the objective.

    `N + K` vectorised steps of `N K + N²` multiplications.

    Args:
        damping: of both factors, as a share of the mean of their diagonals.
        search: choose scales by `search_qparams` instead of covering the extremes.
        sweeps: of descent.
        rows: at a time in a sweep.
    """

    damping: float = 0.01
    search: bool = True
    sweeps: int = 2
    rows: int = 16
    needs: ClassVar[tuple[str, ...]] = ("outer", "inner")

    def __post_init__(self) -> None:
        if self.damping < 0 or self.rows < 1 or self.sweeps < 0:
            raise OptionError("damping and sweeps are at least 0, rows at least 1", where=str(self))

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        grid = Grid(encoding, self.search)
        H_in, U_in = (matrix.float() for matrix in factored(evidence.take("inner"), self.damping))
        H_out, U_out = (matrix.float() for matrix in factored(evidence.take("outer"), self.damping))
        codes, qparams = GPTQ(damping=self.damping, search=self.search).by_columns(W, grid, evidence.take("inner"))
        tried = round_both_ways(W, qparams, grid, U_out, U_in)
        errors = [kronecker_error(W - numerics.dequantize(found, qparams, encoding), H_out, H_in) for found in (codes, tried)]
        codes = tried if errors[1] < errors[0] else codes
        for _ in range(self.sweeps):
            codes, qparams = self._sweep(W, codes, qparams, grid, H_out, H_in)
        return codes, qparams

    def _sweep(self, W: Tensor, codes: Tensor, qparams: QParams, grid: Grid, H_out: Tensor, H_in: Tensor) -> tuple[Tensor, QParams]:
        """Let all rows descend, a few at a time."""
        codes, qparams = codes.clone(), replace(qparams, scale=qparams.scale.clone())
        W_hat, shared = numerics.dequantize(codes, qparams, grid.encoding), grid.encoding.block_shape(tuple(W.shape))[0]
        step = -(-self.rows // shared) * shared  # rows that share scales stay together
        for start in range(0, len(W), step):
            R, blocks = slice(start, start + step), slice(start // shared, -(-(start + step) // shared))
            D = H_out[R, R].abs().sum(1)
            D = D if shared == 1 else D.max().expand_as(D)  # rows that share a scale are weighed alike by the descent
            target = W_hat[R] + H_out[R] @ (W - W_hat) / D[:, None]
            z = qparams.zero_point
            own = QParams(qparams.scale[blocks], None if z is None else z[blocks])
            codes[R], fitted = descend(target, codes[R], own, grid, H_in, sweeps=1)
            qparams.scale[blocks] = fitted.scale
            W_hat[R] = numerics.dequantize(codes[R], fitted, grid.encoding)
        return codes, qparams


def kronecker_error(D: Tensor, H_out: Tensor, H_in: Tensor) -> float:
    """`tr(H_out D H_in Dᵀ)` of an error `D [N, K]`."""
    return float((H_out @ D * (D @ H_in)).sum())


def round_both_ways(W: Tensor, qparams: QParams, grid: Grid, U_out: Tensor, U_in: Tensor) -> Tensor:
    """Codes `[N, K]` by feedback over rows and columns, with given parameters: all entries of an antidiagonal at once.

    With `T_kj = Σ_l≤j E_kl U_in,lj`, the feedback to entry (i, j) is `Σ_k<i U_out,ki T_kj + U_out,ii Σ_l<j E_il U_in,lj`: each entry that
    is done adds to the later ones of its row in T, and then of its column in the sum over k.
    """
    N, K = W.shape
    scale = numerics.expand(qparams.scale, grid.encoding, (N, K)).expand(N, K)
    z = None if qparams.zero_point is None else numerics.expand(qparams.zero_point, grid.encoding, (N, K)).expand(N, K)
    single, codes = replace(grid.encoding, block=(1,)), torch.empty_like(W, dtype=numerics.storage_dtype(grid.encoding))
    # Along an antidiagonal columns fall as rows rise: reversed, both are slices.
    U_in_reversed, across, down = U_in.flip(0), torch.zeros_like(W), W.new_zeros(K, N)
    out_diagonal, in_diagonal = U_out.diagonal(), U_in.diagonal()
    for d in range(N + K - 1):
        i = torch.arange(max(0, d - K + 1), min(N, d + 1), device=W.device)
        j, rows = d - i, slice(int(i[0]), int(i[-1]) + 1)
        columns = slice(K - 1 - int(j[0]), K - int(j[-1]))
        at = QParams(scale[i, j], None if z is None else z[i, j])
        v = W[i, j] - down[columns, rows].diagonal() - out_diagonal[rows] * across[i, j]
        codes[i, j] = q = grid.quantize(v, at, single)
        e = (v - numerics.dequantize(q, at, single)) / (out_diagonal[rows] * in_diagonal[j])
        across[rows].addcmul_(e[:, None], U_in_reversed[columns])
        down[columns].addcmul_(across[i, j][:, None], U_out[rows])
    return codes
