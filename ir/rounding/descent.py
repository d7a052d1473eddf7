"""Exact coordinate descent on the codes and scales of a weight."""

from dataclasses import replace

import torch
from torch import Tensor

from ir import numerics
from ir.numerics import QParams
from ir.rounding.grid import SCALE_DTYPE, Draft, Grid

_BLOCK = 128  # columns of a descent between two updates of the rest of their group


def descend(
    W: Tensor, codes: Tensor, qparams: QParams, grid: Grid, H: Tensor, *, sweeps: int, fixed: bool = False
) -> tuple[Tensor, QParams]:
    """Codes and scales with a smaller `tr(ΔW H ΔWᵀ)`, by exact coordinate descent.

    In every group, each column in turn takes the code nearest to its optimum with all others fixed, `ŵ_j + (ΔW H)_j / H_jj`; then the group
    takes its best scale for these codes, `s + qᵀ(HΔWᵀ) / qᵀHq` (the exact scales of 2606.10890, one group at a time). No step raises the
    error; zero points stay, and with `fixed` codes stay too. `W` and `codes` are `[N, K]` and not changed, `H` is float32 `[K, K]` with a
    positive diagonal.
    """
    draft = Draft(grid, codes.T.clone(memory_format=torch.contiguous_format), replace(qparams, scale=qparams.scale.clone()))
    g = draft.group
    V_hat = numerics.dequantize(codes, qparams, grid.encoding).T.contiguous()
    for _ in range(sweeps):
        P = H @ (W.T - V_hat)  # −½ gradient, [K, N]; kept right only where it is read again
        for start in range(0, len(H), g):
            span = slice(start, start + g)
            group, old = (V_hat[span], P[span], H[span, span]), V_hat[span].clone()
            if not fixed:
                _descend_codes(draft, *group, start)
            _fit_scale(draft, *group, start // g)
            P[start + g :].addmm_(H[start + g :, span], V_hat[span] - old, alpha=-1)
    return draft.codes.T.contiguous(), draft.qparams


def _descend_codes(draft: Draft, V_hat: Tensor, P: Tensor, H: Tensor, start: int) -> None:
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


def _fit_scale(draft: Draft, V_hat: Tensor, P: Tensor, H: Tensor, group: int) -> None:
    """Give one group its best scales, and keep `V_hat` and `P` of its own columns right."""
    z, g = draft.at(group).zero_point, draft.group
    q = draft.codes[group * g : (group + 1) * g].float() - (0 if z is None else z)
    scale = draft.qparams.scale[:, group]
    rows = torch.arange(q.shape[1], device=q.device) // draft.encoding.block_shape((q.shape[1], g))[0]
    slope, curvature = (torch.zeros_like(scale, dtype=torch.float32).index_add(0, rows, (q * x).sum(0)) for x in (P, H @ q))
    best = scale.float() + slope / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    draft.set_scale(group, torch.where(curvature > 0, numerics.stored_scale(best, SCALE_DTYPE), scale))
    step = q * draft.at(group).scale - V_hat
    P.addmm_(H, step, alpha=-1)
    V_hat += step
