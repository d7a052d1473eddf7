"""Descent on codes and scales where both rows and columns of a weight are coupled: `tr(H_out ΔW H_in ΔWᵀ)`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.rounding.grid import SCALE_DTYPE, Grid


def kronecker_error(D: Tensor, H_out: Tensor, H_in: Tensor) -> float:
    """`tr(H_out D H_in Dᵀ)` of an error `D [N, K]`."""
    return float((H_out @ D * (D @ H_in)).sum())


@dataclass
class KroneckerDraft:
    """Codes `[N, K]`, as floats, and parameters that descend, with `P = H_out ΔW H_in`, minus half the gradient; what is given stays."""

    W: Tensor
    codes: Tensor
    qparams: QParams
    grid: Grid
    H_out: Tensor
    H_in: Tensor

    def __post_init__(self) -> None:
        self.encoding = self.grid.encoding
        self.codes, self.qparams = self.codes.to(torch.float32, copy=True), replace(self.qparams, scale=self.qparams.scale.clone())
        self.W_hat = numerics.dequantize(self.codes, self.qparams, self.encoding)
        self.P = self.H_out @ (self.W - self.W_hat) @ self.H_in

    def move_codes(self, steps: int) -> None:
        """Let single codes move to their optimum with all others fixed, in each step those whose gain is the greatest of row and column.

        What a step would change, `−2 δᵀp + δᵀ(H_out,ii' H_in,jj')δ`, is known before it is made: were it to raise the error, the half with
        the greater gains moves.
        """
        scale, z = self._spread()
        d = self.H_out.diagonal()[:, None] * self.H_in.diagonal()
        for _ in range(steps):
            codes = self.grid.nearest((self.P / d).add_(self.W_hat), scale, z)
            step = numerics.restored(codes, scale, z).sub_(self.W_hat)
            gain = (2 * self.P).sub_(d * step).mul_(step).masked_fill_(codes == self.codes, 0)
            best = (gain == gain.amax(1, keepdim=True)).logical_and_(gain == gain.amax(0)).logical_and_(gain > 0)
            i, j = best.nonzero(as_tuple=True)
            order = gain[i, j].argsort(descending=True)
            i, j = i[order], j[order]
            while len(i) > 1 and self._change(i, j, step[i, j]) >= 0:
                i, j = i[: len(i) // 2], j[: len(j) // 2]
            if not len(i):
                return
            self.codes[i, j] = codes[i, j]
            self.W_hat[i, j] += step[i, j]
            self.P.addmm_(self.H_out[:, i] * step[i, j], self.H_in[j], alpha=-1)

    def _change(self, i: Tensor, j: Tensor, step: Tensor) -> float:
        """What a step of some entries does to the error."""
        return float(step @ (self.H_out[i][:, i] * self.H_in[j][:, j]) @ step - 2 * step @ self.P[i, j])

    def fit_scales(self) -> None:
        """Give each group of columns in turn the best scales of all its rows, the exact scales of 2606.10890 in this metric.

        `ds = A⁻¹ r`, with `r_i = Σ_j P_ij q_ij` over the group and `A = H_out ∘ q H_in qᵀ`. Scales that would not lower the error stay.
        """
        N, K = self.W.shape
        _, zero = self._spread()
        rows, g = self.encoding.block_shape((N, K))
        share = torch.nn.functional.one_hot(torch.arange(N, device=self.W.device) // rows).float()  # which rows share a scale
        for group in range(self.qparams.scale.shape[1]):
            span = slice(group * g, (group + 1) * g)
            q = self.codes[:, span] - (0 if zero is None else zero[:, span])
            r = share.T @ (self.P[:, span] * q).sum(1)
            A = share.T @ (self.H_out * (q @ self.H_in[span, span] @ q.T)) @ share
            ridge = 1e-4 * A.diagonal().mean() * torch.eye(len(A), device=A.device)
            old = self.qparams.scale[:, group].float()
            new = numerics.stored_scale(old + torch.linalg.solve(A + ridge, r), SCALE_DTYPE)
            ds = new.float() - old
            if ds @ A @ ds - 2 * ds @ r < 0:
                self.qparams.scale[:, group] = new
                step = (share @ ds)[:, None] * q
                self.W_hat[:, span] += step
                self.P -= self.H_out @ step @ self.H_in[span]

    def _spread(self) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point of every entry."""
        return spread(self.qparams, self.encoding, self.W.shape)


def spread(qparams: QParams, encoding: Encoding, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """The scale and zero point of every entry of a weight, float32 of its `shape`."""
    scale, z = (
        None if x is None else numerics.expand(x.float(), encoding, tuple(shape)).expand(shape).contiguous()
        for x in (qparams.scale, qparams.zero_point)
    )
    assert scale is not None
    return scale, z
