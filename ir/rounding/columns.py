"""Column after column: the loop that all methods with feedback share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ir import numerics
from ir.rounding.factor import factored
from ir.rounding.grid import SCALE_DTYPE, Draft, Grid


@dataclass(frozen=True, eq=False)
class Feedback:
    """What a loop over columns needs of the inputs' second moments.

    Args:
        H: damped, float32 `[K, K]`.
        U: upper, float32 `[K, K]`, `UᵀU = H⁻¹` with rows and columns in `order`.
        order: of the columns, `[K]`.
        sorted: columns go by falling diagonal of H, not in the order of the weight.
    """

    H: Tensor
    U: Tensor
    order: Tensor
    sorted: bool

    @classmethod
    def of(cls, gram: Tensor, damping: float, act_order: bool) -> "Feedback":
        """From a Gram matrix, with damping as of `factored`."""
        if not act_order:  # nothing to sort: matrices are not copied
            H, U = (matrix.float() for matrix in factored(gram, damping))
            return cls(H, U, torch.arange(len(gram), device=gram.device), act_order)
        order = gram.diagonal().argsort(descending=True, stable=True)
        H, U = (matrix.float() for matrix in factored(gram[order][:, order], damping))
        back = order.argsort()
        return cls(H[back][:, back], U, order, act_order)


def round_columns(
    W: Tensor, grid: Grid, feedback: Feedback, *, block: int = 128, extra: Tensor | None = None, first: Tensor | None = None
) -> Draft:
    """Round the columns of `W [N, K]` in order: with `e = (w_j − ŵ_j)/U_jj`, `w_i −= e U_ji` for the columns i still free.

    The parameters of a group are chosen when it is reached, from the weights as updated by then; beforehand if columns are sorted. They
    weigh the error of column j by `1/U_jj²`: what it costs after all later columns have made up for it.

    Args:
        W: float32, not changed.
        grid: the values that columns can take.
        feedback: of the inputs.
        block: columns between two updates of all that follow; affects speed only.
        extra: `[K, K]`, strictly upper, in `order`: `w_i += w_j extra_ji` as column j is rounded.
        first: `[N]`, rounded in place of the first column, whose error is still counted from that column.
    """
    U, order = feedback.U, feedback.order
    importance, columns, diagonal = U.diagonal() ** -2, order.tolist(), U.diagonal().tolist()
    V = W.T[order].contiguous()  # [K, N]: the columns not yet rounded, updated
    codes = torch.empty(V.shape, dtype=numerics.storage_dtype(grid.encoding), device=V.device)
    ahead = grid.choose(W, importance[order.argsort()]) if feedback.sorted else numerics.choose_qparams(W, grid.encoding, SCALE_DTYPE)
    draft = Draft(grid, codes, ahead)
    g = draft.group
    for start, end in _spans(len(V), len(V) if feedback.sorted else g, block):
        errors = torch.empty_like(V[start:end])
        for j in range(start, end):
            if not feedback.sorted and j % g == 0:
                draft.set_group(j // g, grid.choose(V[j : j + g].T, importance[j : j + g]))
            rounded = draft.round(columns[j], V[j] if first is None or j else first)
            e = torch.div(torch.sub(V[j], rounded, out=rounded), diagonal[j], out=errors[j - start])
            V[j + 1 : end].addr_(U[j, j + 1 : end], e, alpha=-1)
            if extra is not None:
                V[j + 1 : end].addr_(extra[j, j + 1 : end], V[j])
        V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
        if extra is not None:
            V[end:].addmm_(extra[start:end, end:].T, V[start:end])
    return draft


def _spans(K: int, group: int, block: int) -> list[tuple[int, int]]:
    """Blocks of columns within one group or of whole groups, so that a group is up to date where it starts."""
    whole = block // group * group if group <= block else group
    return [(i, min(i + block, a + whole, K)) for a in range(0, K, whole) for i in range(a, min(a + whole, K), block)]
