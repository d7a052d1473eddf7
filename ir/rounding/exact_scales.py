"""Exact scales: codes to nearest, scales by least squares of the outputs."""

from dataclasses import dataclass
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
from ir.rounding.grid import Grid


@dataclass(frozen=True)
class ExactScales(Rounding):
    """Round to nearest, then give the scales their optimum for these codes, and so in turn: least `tr(ΔW H ΔWᵀ)` that scales alone reach.

    2606.10890: for a fixed pattern q, `s* = qᵀGw / qᵀHq`, with `H = X̂ᵀX̂`. Here `G = H`, and with propagation (`propagate_error` at
    strength 1) `G = X̂ᵀX`. Where several groups of columns have a scale each, one takes its optimum after the other. As codes nearest to `w`
    are not the best ones for `H`, each row keeps the best that it has had; `gptq`, which moves the codes too, ends lower.

    Args:
        search: start from the scales of `search_qparams` instead of the extremes'.
        sweeps: of codes and all scales.
    """

    search: bool = True
    sweeps: int = 4
    needs: ClassVar[tuple[str, ...]] = ("gram",)
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise OptionError(f"sweeps are at least 1, not {self.sweeps}", where=str(self))

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        gram, grid = evidence.take("gram"), Grid(encoding, self.search)
        H = factored(gram, 0.0)[0].float()
        best = qparams = grid.choose(W, gram.diagonal().float())
        kept, least = numerics.quantize(W, qparams, encoding), torch.full_like(qparams.scale[:, 0], torch.inf, dtype=torch.float32)
        for _ in range(self.sweeps):
            codes, qparams = descend(W, numerics.quantize(W, qparams, encoding), qparams, grid, H, sweeps=2, fixed=True)
            found = _errors(W, codes, qparams, encoding, H)
            better, least = found < least, torch.minimum(found, least)
            kept = torch.where(numerics.expand(better[:, None], encoding, tuple(W[:, :1].shape)), codes, kept)
            best = QParams(torch.where(better[:, None], qparams.scale, best.scale), best.zero_point)
        return kept, best


def _errors(W: Tensor, codes: Tensor, qparams: QParams, encoding: Encoding, H: Tensor) -> Tensor:
    """`(ΔW H ΔWᵀ)_nn`, summed over the rows that share scales, `[blocks of rows]`."""
    D = W - numerics.dequantize(codes, qparams, encoding)
    rows = torch.arange(len(W), device=W.device) // encoding.block_shape(tuple(W.shape))[0]
    return torch.zeros(len(qparams.scale), device=W.device).index_add(0, rows, (D @ H * D).sum(1))
