"""Invertible transforms of blocks of channels that leave the activation and its readers the same covariance, in closed form.

A linear layer `Y = X Wᵀ` is `(X Tᵀ)(W T⁻¹)ᵀ` for any invertible `T`. With one scale a token and one an output channel, and a rotation that
spreads each row evenly, rounding errors grow with `‖X Tᵀ‖_F · ‖W T⁻¹‖_F`. The least value of that is the nuclear norm of `W Xᵀ`; for
block-diagonal `T` it is the sum of the blocks' nuclear norms, reached in closed form (the idea of WUSH, 2512.00956). Diagonal ones reach
`Σ ‖x_j‖ ‖w_j‖`, with `s_j = √(‖x_j‖ / ‖w_j‖)`.

Letters: `G_x = XᵀX`, `G_w = WᵀW`, both `[n, n]`; `b` the size of a block, which divides `n`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.errors import DataError, OptionError

DAMPING = 1e-4  # of a block's mean diagonal; readers with fewer rows than b leave G_w without full rank


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


def apply(blocks: Tensor, x: Tensor) -> Tensor:
    """`y = x Bᵀ` with `B` block-diagonal, `blocks [n/b, b, b]`, `x [..., n]`; in the dtype of `x`."""
    count, b, _ = blocks.shape
    split = x.reshape(-1, count, b).transpose(0, 1)
    return (split @ blocks.to(x).mT).transpose(0, 1).reshape(x.shape)


def balanced(gram_x: Tensor, gram_w: Tensor, block: int, damping: float = DAMPING) -> Tensor:
    """The transform, float64 `[n/b, b, b]`, after which both grams have the same diagonal blocks, and these are diagonal.

    With `G_x = L_x L_xᵀ`, `G_w = L_w L_wᵀ` per block and the singular values `L_wᵀ L_x = U S Vᵀ`: `T = S^(−½) Uᵀ L_wᵀ`. Then
    `T G_x Tᵀ = S = T⁻ᵀ G_w T⁻¹`; any orthogonal map after it keeps both equal, and a Hadamard transform spreads them evenly.

    Args:
        gram_x: `XᵀX`, positive semidefinite.
        gram_w: `WᵀW`, likewise.
        block: its size `b`.
        damping: added to both diagonals, as a share of the block's mean; the grams are then equal up to it. Zero needs full rank.

    Raises:
        OptionError: `block` does not divide the channels.
        DataError: grams that are misshapen, not finite, or that stay without full rank.
    """
    X, W = (_factor(_blocks(gram, block), damping, name) for gram, name in ((gram_x, "the activation"), (gram_w, "the weight")))
    U, S, _ = torch.linalg.svd(W.mT @ X)
    T: Tensor = S.rsqrt().unsqueeze(-1) * (U.mT @ W.mT)
    return T


def inverse(T: Tensor) -> Tensor:
    """The inverse of every block."""
    result: Tensor = torch.linalg.inv(T)
    return result


def stages(gram_x: Tensor, gram_w: Tensor, blocks: Sequence[int], damping: float = DAMPING, grouped: bool = True) -> list[Stage]:
    """Balance in several stages, each with blocks of its own size on what the stages before it left.

    After a stage no block has anything left to balance, so the next takes its channels from different blocks: the i-th of every block where
    sizes fit (`n = b₁ b₂`, as the factors of a Hadamard transform), else as `grouping` puts them.

    Args:
        blocks: sizes; `(16, 44)` costs 60 multiplications a channel, `(64,)` 64.
        grouped: permute the channels by `grouping` before the first stage.

    Raises:
        OptionError, DataError: as `balanced`.
    """
    n, found = len(gram_x), list[Stage]()
    gram_x, gram_w = gram_x.double(), gram_w.double()
    for index, b in enumerate(blocks):
        if index and blocks[index - 1] * b == n:
            order = torch.arange(n).reshape(b, -1).T.flatten()
        else:
            order = grouping(gram_x, gram_w, b) if grouped or index else torch.arange(n)
        gram_x, gram_w = gram_x[order][:, order], gram_w[order][:, order]
        T = balanced(gram_x, gram_w, b, damping)
        stage = Stage(order, T, inverse(T))
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
        OptionError, DataError: as `balanced`.
    """
    _blocks(gram_x, block), _blocks(gram_w, block)
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


def _blocks(gram: Tensor, block: int) -> Tensor:
    """The diagonal blocks, float64 `[n/b, b, b]`."""
    n = len(gram)
    if gram.shape != (n, n) or not torch.isfinite(gram).all():
        raise DataError(f"a Gram matrix is square and finite, not this {list(gram.shape)}")
    if block < 1 or n % block:
        raise OptionError(f"blocks of {block} do not divide {n} channels")
    split = gram.double().reshape(n // block, block, n // block, block)
    return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _factor(grams: Tensor, damping: float, name: str) -> Tensor:
    """Lower `L` with `L Lᵀ = G + λI`."""
    mean = grams.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    mean = torch.where(mean > 0, mean, 1.0)  # a block that no input reaches
    L, failed = torch.linalg.cholesky_ex(grams + damping * mean[:, None, None] * eye)
    if failed.any():
        raise DataError(f"a block of {name}'s Gram matrix has no full rank", remedy="calibrate on more tokens, or raise the damping")
    factor: Tensor = L
    return factor
