"""Masks over channels while they are being learned: the generator of their gates, and linears in two schemes at once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ir import numerics
from ir.encoding import Encoding
from ir.sites import Mark
from ir.straight_through import fake_quantize

TEMPERATURE, OFFSET = 0.4, 3.0  # of the gates: they start open
INPUT, HIDDEN = 32, 64


class MaskGenerator(nn.Module):
    """Logits of all masks from one small network over a frozen input, so that masks of neighbouring layers are learned together.

    As DISP-LLM's (2410.11988): a normal input `[masks, 1, 32]`, a bidirectional GRU of 64, layer norm, GELU, a linear head for each mask.

    Args:
        sizes: channels of each mask.
        generator: of what is drawn.
    """

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = torch.randn(len(sizes), 1, INPUT, generator=generator)
        self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(2 * HIDDEN, size) for size in sizes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                bound = parameter.shape[1] ** -0.5
                parameter.data = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
            elif not any(parameter is own for own in self.norm.parameters()):
                parameter.data.zero_()

    def forward(self) -> list[Tensor]:
        """The logits, `[channels]` each."""
        features, _ = self.gru(self.frozen)
        hidden = nn.functional.gelu(self.norm(features[:, 0]))
        return [head(row) for head, row in zip(self.heads, hidden, strict=True)]


def gate(logits: Tensor, generator: torch.Generator) -> Tensor:
    """`sigmoid((logit + g + 3) / 0.4)` with `g` drawn from the logistic distribution, the difference of two Gumbel draws."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return ((logits + uniform.logit() + OFFSET) / TEMPERATURE).sigmoid()


def hard(gates: Tensor) -> Tensor:
    """0 or 1; the gradient is that of the gates."""
    return (gates > 0.5).to(gates.dtype) + gates - gates.detach()


def distance_to(budget: float, spent: Tensor) -> Tensor:
    """`log(max(b, B) / min(b, B))`; of nothing spent, that of next to nothing."""
    return (spent.clamp_min(1e-6) / budget).log().abs()


def mixed_linear(low: Mark, high: Mark, gates: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear whose channels are in `high` as far as their gates are open, else in `low`; instead of `aten.linear`.

    `F(V) = Q_h(V) m + Q_l(V) (1 − m)` for the input and the weight alike (2606.07819). How scales see masks is open there: here those of
    the low part are chosen from `V (1 − m)`, so that they become the split layer's as gates close, and those of the high part from all of
    `V`. Nothing of the size of the weight is kept for the backward pass.
    """
    apply = partial(_mixed, low, high)
    result: Tensor = checkpoint(apply, gates, x, weight, bias, use_reentrant=False)
    return result


def _mixed(low: Mark, high: Mark, gates: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    W = weight.to(numerics.compute_dtype(weight.dtype))
    W_mixed = _stored(W, high.weight, torch.ones_like(gates)) * gates + _stored(W, low.weight, 1 - gates.detach()) * (1 - gates)
    x_mixed = _computed(x, high.input, torch.ones_like(gates)) * gates + _computed(x, low.input, 1 - gates) * (1 - gates)
    return nn.functional.linear(x_mixed.to(x.dtype), W_mixed.to(x.dtype), bias)


def _stored(W: Tensor, encoding: Encoding, share: Tensor) -> Tensor:
    """A weight rounded with the scales of its `share` of columns."""
    chosen = numerics.choose_qparams(W * share, encoding)
    if encoding.bits == 1:  # a mean, of which columns that are not there are no part
        ones = torch.ones_like(W)
        split, axes = numerics.blocked(ones, encoding)
        there, _ = numerics.blocked(ones * share, encoding)
        chosen = replace(chosen, scale=chosen.scale * split.sum(axes) / there.sum(axes).clamp_min(1e-6))
    return numerics.fake_quantize(W, encoding, chosen)


def _computed(x: Tensor, encoding: Encoding | None, share: Tensor) -> Tensor:
    """An input rounded with the scales of its `share` of channels; a gradient reaches the share through them."""
    if encoding is None:
        return x
    x = x.to(numerics.compute_dtype(x.dtype))
    if not encoding.dynamic:
        return fake_quantize(x, encoding)
    split, axes = numerics.blocked(x.detach().abs(), encoding)
    there, _ = numerics.blocked(x.detach().abs() * share, encoding)
    clip = there.amax(axes, keepdim=True) / split.amax(axes, keepdim=True).clamp_min(numerics.TINY)
    return fake_quantize(x, encoding, clip.clamp_min(1e-4) * encoding.clip)
