"""Block transforms in several stages, with channels put together that gain from it: what `bench_smoothrot` compares with one stage.

Letters: `G_x = XᵀX`, `G_w = WᵀW`, both `[n, n]`; `b` the size of a block, which divides `n`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.block_transform import DAMPING, apply, balanced
from ir.errors import DataError, OptionError


@dataclass(frozen=True)
class Stage:
    """One block-diagonal transform after a permutation: `y = blocks · x[order]`.

    Args:
        order: the channels in their new order, int64 `[n]`. That of a first stage folds into the writer and the readers.
        T: `[n/b, b, b]`.
        inverse: of each block.
    """

    order: Tensor
    T: Tensor
    inverse: Tensor

    def activation(self, x: Tensor) -> Tensor:
        """`x Tᵀ` of `x [..., n]`, in its dtype: b multiplications a channel."""
        return apply(self.T, x[..., self.order])

    def weight(self, W: Tensor) -> Tensor:
        """`W T⁻¹` of `W [out, n]`, in its dtype."""
        return apply(self.inverse.mT, W[..., self.order])


def stages(gram_x: Tensor, gram_w: Tensor, blocks: Sequence[int], damping: float = DAMPING, grouped: bool = True) -> list[Stage]:
    """Balance in several stages, each with blocks of its own size on what the stages before it left.

    After a stage no block has anything left to balance, so the next takes its channels from different blocks: the i-th of every block where
    sizes fit (`n = b₁ b₂`, as the factors of a Hadamard transform), else as `grouping` puts them.

    Args:
        blocks: sizes; `(16, 44)` costs 60 multiplications a channel, `(64,)` 64.
        grouped: permute the channels by `grouping` before the first stage.

    Raises:
        OptionError, DataError: as `diagonal_blocks` and `balanced`.
    """
    n, found = len(gram_x), list[Stage]()
    gram_x, gram_w = gram_x.double(), gram_w.double()
    for index, b in enumerate(blocks):
        if index and blocks[index - 1] * b == n:
            order = torch.arange(n).reshape(b, -1).T.flatten()
        else:
            order = grouping(gram_x, gram_w, b) if grouped or index else torch.arange(n)
        gram_x, gram_w = gram_x[order][:, order], gram_w[order][:, order]
        T = balanced(diagonal_blocks(gram_x, b), diagonal_blocks(gram_w, b), damping)
        stage = Stage(order, T, torch.linalg.inv(T))
        gram_x = apply(stage.T, apply(stage.T, gram_x).T)
        gram_w = apply(stage.inverse.mT, apply(stage.inverse.mT, gram_w).T)
        found.append(stage)
    return found


def grouping(gram_x: Tensor, gram_w: Tensor, block: int) -> Tensor:
    """An order of the channels that puts into one block those that gain by sharing one, int64 `[n]`.

    Two channels gain the more, the less their correlation in X agrees with that in W: to second order by
    `√(‖x_i‖‖w_i‖ ‖x_j‖‖w_j‖) (c_x − c_w)²`. Blocks are filled greedily: the free channel that could gain most from one other, then
    always the one that gains most from all in the block.

    Raises:
        OptionError, DataError: as `diagonal_blocks` and `balanced`.
    """
    diagonal_blocks(gram_x, block), diagonal_blocks(gram_w, block)
    x, w = (gram.double().diagonal().clamp_min(torch.finfo(torch.float32).tiny).sqrt() for gram in (gram_x, gram_w))
    difference = gram_x.double() / (x.unsqueeze(1) * x) - gram_w.double() / (w.unsqueeze(1) * w)
    size = (x * w).sqrt()
    gain = difference.square() * (size.unsqueeze(1) * size)
    gain.fill_diagonal_(0)
    first, order = gain.amax(1), list[int]()
    for _ in range(len(gain) // block):
        total = first.clone()
        total[order] = -torch.inf
        group = [int(total.argmax())]
        total += gain[group[0]] - first
        while len(group) < block:
            total[group[-1]] = -torch.inf
            group.append(int(total.argmax()))
            total += gain[group[-1]]
        order += group
    return torch.tensor(order, device=gram_x.device)


def diagonal_blocks(gram: Tensor, block: int) -> Tensor:
    """The blocks on the diagonal, float64 `[n/b, b, b]`.

    Raises:
        OptionError: `block` does not divide the channels.
        DataError: no square matrix, or one that is not finite.
    """
    n = len(gram)
    if gram.shape != (n, n) or not torch.isfinite(gram).all():
        raise DataError(f"a Gram matrix is square and finite, not this {list(gram.shape)}")
    if block < 1 or n % block:
        raise OptionError(f"blocks of {block} do not divide {n} channels")
    split = gram.double().reshape(n // block, block, n // block, block)
    return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
