"""`Codes`: integers and scales of one weight while they are being learned."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ir import edit, numerics
from ir.numerics import QParams
from ir.rounding import SCALE_DTYPE
from ir.sites import Layer
from ir.straight_through import fake_quantize


class Codes:
    """The weight of one linear as `(q − z) s` with `q = round(W / s₀ + z + v)`: offsets `v` and scales `s` are learned.

    Zero points, and the scales `s₀` that codes are counted in, stay as they were found. One bit has the codes −1 and 1, two apart:
    `q = sign(W / s₀ + 2v)`.

    Args:
        gm: the graph; `W` stays in it and is not changed.
        layer: annotated, its weight in floating point.
        codes: to start from, `[N, K]`.
        qparams: that they were found with.
    """

    def __init__(self, gm: GraphModule, layer: Layer, codes: Tensor, qparams: QParams) -> None:
        encoding = layer.site("weight").encoding
        assert encoding is not None
        self.gm, self.layer, self.encoding = gm, layer, encoding
        self.first = QParams(qparams.scale.float(), qparams.zero_point)
        self.offset = edit.kept(gm, self._offsets(codes))
        self.log_scale = nn.Parameter(torch.zeros_like(self.first.scale))
        self.rate = 0.0

    def _stored(self) -> Tensor:
        return edit.attribute(self.gm, self.layer.weight).detach().float()

    def _offsets(self, codes: Tensor) -> Tensor:
        """What leads from the weight to given codes: nothing to the nearest, to a neighbour the middle of what leads there, else all."""
        place = self._place()
        if self.encoding.bits == 1:
            step, edge = (codes - torch.where(place < 0, -1, 1)) / 2, -place / 2
        else:
            step = codes - place.round()
            edge = step.sign() / 2 + place.round() - place  # where the code changes
        neighbour = (step.abs() == 1) & (edge.abs() < 0.5)
        return torch.where(step == 0, 0.0, torch.where(neighbour, (edge + step.sign() / 2) / 2, codes - place)).half()

    def _place(self) -> Tensor:
        """`W / s₀ + z`."""
        W, z = self._stored(), self.first.zero_point
        return W / self._spread(self.first.scale) + (0.0 if z is None else self._spread(z.float()))

    def levels(self) -> tuple[Tensor, Tensor]:
        """`q − z`, and where a step of `v` can change it."""
        place, offset = self._place(), edit.counted(self.gm, self.offset)
        if self.encoding.bits == 1:
            signs = torch.where(torch.add(place, offset, alpha=2) < 0, -1.0, 1.0)
            return signs, torch.ones_like(signs, dtype=torch.bool)
        least, greatest = numerics.code_range(self.encoding)
        q = (place + offset).round_()
        z = self.first.zero_point
        return q.clamp(least, greatest) - (0.0 if z is None else self._spread(z.float())), (q >= least) & (q <= greatest)

    def values(self, levels: Tensor) -> Tensor:
        """The weight that levels stand for, float32 `[N, K]`."""
        return levels * self._spread(self.scale)

    def _spread(self, values: Tensor) -> Tensor:
        return numerics.expand(values, self.encoding, tuple(edit.value(self.layer.weight).shape))

    @property
    def scale(self) -> Tensor:
        """The scales as learned so far."""
        return (self.first.scale * self.log_scale.detach().exp()).clamp_min(numerics.TINY_HALF)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with both operands rounded, in place of `aten.linear`."""
        encoding = self.layer.site("input").encoding
        if encoding is not None:
            x = fake_quantize(x.to(numerics.compute_dtype(x.dtype)), encoding, encoding.clip).to(x.dtype)
        result: Tensor = _Linear.apply(x, self.log_scale, bias, self)  # type: ignore[no-untyped-call]
        return result

    def learn(self, gradient: Tensor, levels: Tensor, free: Tensor) -> Tensor:
        """Move the offsets against the gradient of the weight `[N, K]`; returns that of the logarithms of scales."""
        step = torch.where(free, gradient.sign(), 0.0).to(self.offset.dtype)
        self.offset.sub_(step, alpha=self.rate)
        split, axes = numerics.blocked(gradient * levels, self.encoding)
        return split.sum(axes) * self.scale

    def result(self) -> tuple[Tensor, QParams]:
        """Codes and parameters as they are stored."""
        levels, _ = self.levels()
        z = self.first.zero_point
        codes = levels if z is None else levels + self._spread(z.float())
        return codes.to(numerics.storage_dtype(self.encoding)), QParams(numerics.stored_scale(self.scale, SCALE_DTYPE), z)


class _Linear(torch.autograd.Function):
    """`x Ŵᵀ + b`, whose rounded weight lives for one call; `Codes` learns in the backward pass, so that no gradient of a weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, bias: Tensor | None, codes: Codes) -> Tensor:
        ctx.save_for_backward(x)
        ctx.codes = codes
        levels, _ = codes.levels()
        return torch.nn.functional.linear(x, codes.values(levels).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x,), (g,), codes = ctx.saved_tensors, gradients, ctx.codes
        levels, free = codes.levels()
        of_x = g @ codes.values(levels).to(g.dtype)
        of_weight = g.flatten(0, -2).float().mT @ x.flatten(0, -2).float()
        return of_x, codes.learn(of_weight, levels, free), None, None
