"""GuidedQuant: groups of outputs, each with the Hessian that the end loss gives it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ir.encoding import Encoding
from ir.errors import OptionError
from ir.numerics import QParams
from ir.rounding.evidence import Evidence
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import Grid


@dataclass(frozen=True)
class Guided(GPTQ):
    """GPTQ for groups of outputs apart, least `Σ_g tr(ΔW_g H_g ΔW_gᵀ)`, with tokens weighed by how much the end loss feels them.

    GuidedQuant (2505.07004): `H_g = Σ_t w_tg x̂_t x̂_tᵀ`, `w_tg` the mean squared gradient of the loss at the outputs of group g and token t:
    the blocks of the Fisher information that belong to single outputs, averaged over a group. Other options are those of `GPTQ`.

    Args:
        groups: of consecutive outputs, as even as can be; `K² groups` floats a linear.

    Raises:
        OptionError: scales that rows of two groups share.
    """

    groups: int = 4
    needs: ClassVar[tuple[str, ...]] = ("grams",)
    by_rows: ClassVar[bool] = False  # which Hessian a row has is told by its place among all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise OptionError(f"there is at least 1 group, not {self.groups}", where=str(self))

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        grams, rows = evidence.take("grams"), encoding.block_shape(tuple(W.shape))[0]
        parts = row_groups(len(W), len(grams))
        if any(part.start % rows for part in parts):
            raise OptionError(f"scales of {encoding} are shared by rows of two groups", remedy="give every row its own, or groups=1")
        found = [self.by_columns(W[part], Grid(encoding, self.search), gram) for part, gram in zip(parts, grams, strict=True)]
        z = [qparams.zero_point for _, qparams in found if qparams.zero_point is not None]
        scale = torch.cat([qparams.scale for _, qparams in found])
        return torch.cat([codes for codes, _ in found]), QParams(scale, torch.cat(z) if z else None)


def row_groups(N: int, groups: int) -> list[slice]:
    """Consecutive rows of each group; sizes differ by one at most, and there are no more groups than rows."""
    groups = min(groups, N)
    edges = [N * index // groups for index in range(groups + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
