"""Round to nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.grid import Grid


@dataclass(frozen=True)
class Nearest(Rounding):
    """Round every weight to the nearest code; `search` chooses scales by `search_qparams`, weighted by the diagonal of `gram`, if any.

    One bit is `sign(W) · mean|w|` over each block.
    """

    search: bool = False

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        importance = torch.ones_like(W[0]) if evidence.gram is None else evidence.gram.diagonal().float()
        qparams = Grid(encoding, self.search).choose(W, importance)
        return numerics.quantize(W, qparams, encoding), qparams
