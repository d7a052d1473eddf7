"""YAQA: feedback over rows and columns, against the Fisher information of the whole model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.numerics import QParams
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.factor import factored
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import Grid
from ir.rounding.kronecker import KroneckerDraft, spread

_SHARE = 8  # (N + K) / _SHARE steps of moving codes in a sweep, each of about N K / (N + K) codes


@dataclass(frozen=True)
class YAQA(Rounding):
    """Round with feedback over rows and columns, least `tr(H_out ΔW H_in ΔWᵀ)`: the model's KL as a Kronecker pair sees it.

    YAQA (2505.22988): `H_in = E[GᵀG]`, `H_out = E[GGᵀ]` of gradients `G [N, K]` of the log likelihood, here of single tokens. With
    `U_outᵀU_out = H_out⁻¹` and `U_in` likewise, `ΔW = U_outᵀ E U_in` and the objective is `‖E‖²`; entry (i, j) takes the code nearest
    to `w_ij − Σ U_out,ki E_kl U_in,lj`, over what is above and to the left of it. Scales are those that GPTQ finds with `H_in`. The
    sweeps, not in the paper, descend on the same objective: `KroneckerDraft` moves codes, then fits scales. On the factors of a trained
    model they take away a third to two thirds of what the feedback leaves.

    The feedback takes `N + K` vectorised steps of `N K + N²` multiplications, a sweep about `N K (N + K)` and more.

    Args:
        damping: of both factors, as a share of the mean of their diagonals; more than GPTQ's, since gradients vary more than inputs.
        search: choose scales by `search_qparams` instead of covering the extremes.
        sweeps: of descent.
    """

    damping: float = 0.2
    search: bool = True
    sweeps: int = 3
    needs: ClassVar[tuple[str, ...]] = ("outer", "inner")

    def __post_init__(self) -> None:
        if self.damping < 0 or self.sweeps < 0:
            raise OptionError("damping and sweeps are at least 0", where=str(self))

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        grid = Grid(encoding, self.search)
        _, qparams = GPTQ(damping=self.damping, search=self.search, sweeps=0).by_columns(W, grid, evidence.take("inner"))
        H_in, U_in = (matrix.float() for matrix in factored(evidence.take("inner"), self.damping))
        H_out, U_out = (matrix.float() for matrix in factored(evidence.take("outer"), self.damping))
        draft = KroneckerDraft(W, round_both_ways(W, qparams, grid, U_out, U_in), qparams, grid, H_out, H_in)
        for _ in range(self.sweeps):
            draft.move_codes(-(-sum(W.shape) // _SHARE))
            draft.fit_scales()
        return draft.codes.to(numerics.storage_dtype(encoding)), draft.qparams


def round_both_ways(W: Tensor, qparams: QParams, grid: Grid, U_out: Tensor, U_in: Tensor) -> Tensor:
    """Codes `[N, K]`, as floats, by feedback over rows and columns, with given parameters: all entries of an antidiagonal at once.

    With `T_kj = Σ_l≤j E_kl U_in,lj`, the feedback to entry (i, j) is `Σ_k<i U_out,ki T_kj + U_out,ii Σ_l<j E_il U_in,lj`: each entry that
    is done adds to the later ones of its row in T, and then of its column in the sum over k.
    """
    N, K = W.shape
    across, down = torch.zeros_like(W), W.new_zeros(K, N)
    # With the columns in reverse, the entries of an antidiagonal are a diagonal, and both their rows and their columns are slices.
    scale, z = (None if own is None else own.flip(1) for own in spread(qparams, grid.encoding, W.shape))
    assert scale is not None
    W, U_in, codes = W.flip(1), U_in.flip(0, 1), torch.empty_like(W)
    out_diagonal, in_diagonal = U_out.diagonal(), U_in.diagonal()
    for d in range(N + K - 1):
        at = K - 1 - d
        first, last = max(0, -at), min(N, d + 1)  # rows
        rows, columns = slice(first, last), slice(first + at, last + at)
        # Entries to the left, and columns of rows above, are done.
        left, below = slice(0, last + at), slice(first, N)
        v = W.diagonal(at) - down[columns, rows].diagonal() - out_diagonal[rows] * across.diagonal(at)
        own, zero = scale.diagonal(at), None if z is None else z.diagonal(at)
        q = grid.nearest(v, own, zero)
        codes.diagonal(at).copy_(q)
        e = (v - numerics.restored(q, own, zero)) / (out_diagonal[rows] * in_diagonal[columns])
        across[rows, left].addcmul_(e[:, None], U_in[columns, left])
        down[columns, below].addcmul_(across.diagonal(at)[:, None], U_out[rows, below])
    return codes.flip(1)
