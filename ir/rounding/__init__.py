"""Rounding of weights: codes and scales, to nearest or with the least error that some objective sees.

For a linear layer `Y = X Wᵀ` the output's squared error is `tr(ΔW H ΔWᵀ)`, `ΔW = W − Ŵ`, with the Gram matrix `H = XᵀX [K, K]`. One file a
method; all have the interface `Rounding`, and say which parts of `Evidence` they need.
"""

from ir.rounding.descent import descend
from ir.rounding.evidence import Evidence, Rounding
from ir.rounding.exact_scales import ExactScales
from ir.rounding.gptaq import GPTAQ
from ir.rounding.gptq import GPTQ
from ir.rounding.grid import SCALE_DTYPE, Grid, search_qparams
from ir.rounding.guided import Guided, row_groups
from ir.rounding.nearest import Nearest
from ir.rounding.propagation import propagate_error
from ir.rounding.qronos import Qronos
from ir.rounding.ternary import Ternary
from ir.rounding.yaqa import YAQA

METHODS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
    "gptq": GPTQ,
    "gptaq": GPTAQ,
    "qronos": Qronos,
    "guided": Guided,
    "yaqa": YAQA,
    "exact_scales": ExactScales,
    "ternary": Ternary,
}

__all__ = [
    "GPTAQ",
    "GPTQ",
    "METHODS",
    "SCALE_DTYPE",
    "YAQA",
    "Evidence",
    "ExactScales",
    "Grid",
    "Guided",
    "Nearest",
    "Qronos",
    "Rounding",
    "Ternary",
    "descend",
    "propagate_error",
    "row_groups",
    "search_qparams",
]
