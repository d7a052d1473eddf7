"""Ternary weights: −s, 0 and s."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding, Int
from ir.errors import OptionError
from ir.numerics import QParams
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import SCALE_DTYPE, Grid


@dataclass(frozen=True)
class TernaryGrid(Grid):
    """The codes −1, 0 and 1, with the scale of least weighted squares: no other scale and threshold have a smaller `Σ d (w − s t)²`."""

    def choose(self, W: Tensor, importance: Tensor) -> QParams:
        """See `Grid`. For codes on a set S, `s = Σ_S d|w| / Σ_S d`; the best S holds the greatest |w|, so all such sets are tried."""
        split, axes = numerics.blocked(W.abs(), self.encoding)
        weights, _ = numerics.blocked(importance.expand_as(W), self.encoding)
        rest = tuple(axis for axis in range(split.ndim) if axis not in axes)
        w, d = (value.permute(*rest, *axes).flatten(len(rest)) for value in (split, weights))
        w, order = w.sort(-1, descending=True)
        d = d.gather(-1, order)
        moment, mass = (w * d).cumsum(-1), d.cumsum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        pick = (moment.square() / mass).argmax(-1, keepdim=True)
        scale = (moment / mass).gather(-1, pick)[..., 0]
        return QParams(numerics.stored_scale(scale, SCALE_DTYPE))

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """See `Grid`: zero up to half a scale."""
        return super().nearest(x, scale, zero_point).clamp_(-1, 1)


@dataclass(frozen=True)
class Ternary(Rounding):
    """GPTQ with three values a scale, −s, 0 and s: thresholds and scales by weighted least squares, column feedback, then descent.

    Codes are stored in the two bits of their encoding, `i2[...]`, of which −2 is never used; packed closer they would take log₂ 3 = 1.58.

    Args:
        damping: as of `GPTQ`.
        act_order: as of `GPTQ`.
        sweeps: as of `GPTQ`.

    Raises:
        OptionError: an encoding other than two bits without zero points.
    """

    damping: float = 0.01
    act_order: bool = False
    sweeps: int = 3
    needs: ClassVar[tuple[str, ...]] = ("gram",)
    by_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._loop()

    def _loop(self) -> GPTQ:
        return GPTQ(damping=self.damping, act_order=self.act_order, sweeps=self.sweeps)

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        if encoding.format != Int(2) or not encoding.symmetric:
            raise OptionError(f"ternary codes are stored as i2[...], not {encoding}", remedy="annotate with 2 bits and symmetric=True")
        return self._loop().by_columns(W, TernaryGrid(encoding), evidence.take("gram"))
