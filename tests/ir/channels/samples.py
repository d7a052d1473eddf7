"""Small functions of `x [2, 3, 16]` and stored tensors, for each row of the rules: all in float64, all with random parameters."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812 (everyone's name for it)

from ir.canonical import canonicalize
from ir.capture import capture
from ir.channels import ChannelGroup, Map, channel_groups
from ir.ops import DEQUANTIZE, HADAMARD
from tests.ir.graphs import Applied

WIDTH, HEADS, SIZE = 16, 4, 4


def graph(
    function: Callable[..., Any], *, x: Tensor | None = None, dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]
) -> GraphModule:
    """The normal form of a function of `x` and of parameters of these shapes."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2 for name, shape in shapes.items()}
    x = torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64).to(dtype) if x is None else x
    gm = capture(Applied(function, **parameters), args=(x,))
    canonicalize(gm)
    return gm


@cache
def sample(name: str) -> GraphModule:
    """The graph of a row of `SAMPLES`, made once: do not change it."""
    function, shapes = SAMPLES[name]
    return graph(function, **shapes)


def group_of(gm: GraphModule, kind: Map, path: str, axis: int = 0, at: int = 0) -> ChannelGroup:
    """The group of one entry along the axis of a stored tensor."""
    found = [
        group
        for group in channel_groups(gm, kind)
        if any((member.path, member.axis) == (path, axis) and member.channels[at] >= 0 for member in group.members)
    ]
    assert len(found) == 1
    return found[0]


def verdict(name: str, kind: Map, path: str, axis: int = 0, at: int = 0) -> str:
    """Why the group is frozen; its blocks and their size if it is not."""
    group = group_of(sample(name), kind, path, axis, at)
    return group.reason or f"{group.blocks} x {group.block}"


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """`[batch, heads, tokens, size]`."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def turned(x: Tensor) -> Tensor:
    """What rotary embeddings do to halves of heads."""
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


SQUARE = {"a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH)}
QKVO = dict.fromkeys("qkvo", (WIDTH, WIDTH))
GROUPED = {"q": (WIDTH, WIDTH), "k": (8, WIDTH), "v": (8, WIDTH), "o": (WIDTH, WIDTH)}
linear = F.linear

Sample = tuple[Callable[..., Any], dict[str, tuple[int, ...]]]


def between(function: Callable[..., Any], **more: tuple[int, ...]) -> Sample:
    """`b (f (a x))`: a function of the channels between two linears."""
    return (lambda x, a, b, **rest: linear(function(linear(x, a), **rest), b)), {**SQUARE, **more}


def attending(function: Callable[[Tensor, Tensor, Tensor], Tensor], shapes: dict[str, tuple[int, ...]] = QKVO) -> Sample:
    """A function of queries, keys and values, between linears."""

    def sample(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
        return linear(joined(function(heads(linear(x, q)), *(heads(linear(x, w), w.shape[0] // SIZE) for w in (k, v)))), o)

    return sample, shapes


def repeated(x: Tensor) -> Tensor:
    """As transformers repeats keys and values."""
    batch, count, length, size = x.shape
    return x[:, :, None].expand(batch, count, 2, length, size).reshape(batch, 2 * count, length, size)


def shuffled_halves(x: Tensor) -> Tensor:
    """Gate and up-projection whose halves were stored crosswise."""
    a, b, c, d = x.chunk(4, -1)
    return torch.relu(torch.cat([a, d], -1)) * torch.cat([c, b], -1)


def residual(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h = linear(x, a)
    h = h + linear(torch.relu(linear(F.rms_norm(h, [WIDTH]), b)), c)
    return linear(h, b)


def partly_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = torch.arange(2, dtype=q.dtype).cos()
    q, k = (torch.cat([x[..., :2] * angle + turned(x[..., :2]) * angle, x[..., 2:]], -1) for x in (q, k))
    return softmax_attention(q, k, v)


def dequantized(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    codes, scale = torch.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH).to(torch.int8), torch.ones(1, 1, dtype=x.dtype)
    return linear(linear(x, a), DEQUANTIZE(codes, scale, None, "i8[-1,-1]", x.dtype)) * b.sum()


SAMPLES: dict[str, Sample] = {
    # layers
    "linears": between(lambda y: y),
    "bias": ((lambda x, a, b, c: linear(linear(x, a, c), b)), {**SQUARE, "c": (WIDTH,)}),
    "computed bias": ((lambda x, a, b, c: linear(linear(x, a, 2 * c), b)), {**SQUARE, "c": (WIDTH,)}),
    "computed weight": ((lambda x, a, b: linear(linear(x, a), b.exp())), SQUARE),
    "weight of the input": ((lambda x, a, b: linear(linear(x, a), linear(x[0], b))), SQUARE),
    "weight of a group": ((lambda x, a, b: linear(linear(x, a), b) @ linear(b, a).T), SQUARE),
    "linear of heads": between(lambda y, c: linear(y.unflatten(-1, (HEADS, SIZE)), c).flatten(2), c=(SIZE, SIZE)),
    "called twice": between(
        lambda y, c, d: linear(torch.relu(linear(y, c)), d) + linear(torch.relu(linear(3 * y, c)), d), c=(WIDTH, WIDTH), d=(WIDTH, WIDTH)
    ),
    "called on its own output": between(lambda y, c: y + linear(y, c) + linear(linear(y, c), c), c=(WIDTH, WIDTH)),
    "writer and reader": between(lambda y, c: linear(linear(y, c), c.T), c=(WIDTH, WIDTH)),
    "writer and reader, normed": between(lambda y, c: linear(F.rms_norm(linear(y, c), [WIDTH]), c.T), c=(WIDTH, WIDTH)),
    "read by something else": ((lambda x, a, b: linear(linear(x, a), b) * a.sum()), SQUARE),
    "returned weight": ((lambda x, a, b: (linear(linear(x, a), b), a + 0)), SQUARE),
    "dequantized": (dequantized, SQUARE),
    # norms
    "rms": between(lambda y: F.rms_norm(y, [WIDTH])),
    "rms with gain": between(lambda y, g: F.rms_norm(y, [WIDTH], g), g=(WIDTH,)),
    "rms of heads": between(lambda y: joined(F.rms_norm(heads(y), [SIZE]))),
    "rms of heads with gain": between(lambda y, g: joined(F.rms_norm(heads(y), [SIZE], g)), g=(SIZE,)),
    "rms of two axes": between(lambda y: F.rms_norm(y.unflatten(-1, (HEADS, SIZE)), [HEADS, SIZE]).flatten(2)),
    "rms with computed gain": between(lambda y, g: F.rms_norm(y, [WIDTH], g.exp() * g), g=(WIDTH,)),
    "layer norm": between(lambda y: F.layer_norm(y, [WIDTH])),
    "layer norm with gain and bias": between(lambda y, g, c: F.layer_norm(y, [WIDTH], g, c), g=(WIDTH,), c=(WIDTH,)),
    "layer norm by hand": between(lambda y: (y - y.mean(-1, True)) * (y - y.mean(-1, True)).square().mean(-1, True).rsqrt()),
    "residual": (residual, {**SQUARE, "c": (WIDTH, WIDTH)}),
    # products of values
    "attention": attending(softmax_attention),
    "attention as one": attending(F.scaled_dot_product_attention),
    "grouped attention": attending(lambda q, k, v: softmax_attention(q, repeated(k), repeated(v)), GROUPED),
    "grouped attention as one": attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), GROUPED),
    "attention of one head": attending(softmax_attention, {**GROUPED, "k": (SIZE, WIDTH), "v": (SIZE, WIDTH)}),
    "attention of rank 3": ((lambda x, q, k, v, o: linear(F.scaled_dot_product_attention(*(linear(x, w) for w in (q, k, v))), o)), QKVO),
    "attention, batched": attending(lambda q, k, v: torch.baddbmm(q[:, 0] @ k[:, 0].mT, q[:, 1], k[:, 1].mT).softmax(-1)[:, None] @ v),
    "values added to the input": (
        (lambda x, a, b: linear(torch.baddbmm(x, x @ x.mT, linear(x, a)), b)),
        SQUARE,
    ),
    "attention with a learned mask": attending(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (q @ k.mT).clone())),
    "attention with a mask of channels": (
        (lambda x, q, k, v, o: linear(F.scaled_dot_product_attention(linear(x, q), linear(x, k), linear(x, v), linear(x, o)[..., :1]), o)),
        QKVO,
    ),
    "rotary": attending(
        lambda q, k, v: softmax_attention(*((x * (c := torch.arange(SIZE).cos().to(x.dtype)) + turned(x) * c) for x in (q, k)), v)
    ),
    "partly rotary": attending(partly_turned),
    "fused": (
        (lambda x, a, b: linear(joined(softmax_attention(*map(heads, linear(x, a).split(WIDTH, -1)))), b)),
        {**SQUARE, "a": (48, WIDTH)},
    ),
    "fused by head": (
        (lambda x, a, b: linear(joined(softmax_attention(*linear(x, a).unflatten(-1, (HEADS, 12)).transpose(1, 2).chunk(3, -1))), b)),
        {**SQUARE, "a": (48, WIDTH)},
    ),
    "transposed values": (
        (lambda x, a, b: linear(joined((heads(linear(x, a)).mT @ (x @ x.mT)[:, None]).mT), b)),
        SQUARE,
    ),
    "outer product": between(lambda y, c: (y[..., None] @ c).sum(-1), c=(1, 3)),
    "gram": between(lambda y: y @ (y.mT @ y)),
    # elementwise
    "relu": between(torch.relu),
    "gelu": between(F.gelu),
    "absolute": between(lambda y: (y / 3).abs() * -2),
    "square": between(lambda y: y * y),
    "gated": ((lambda x, a, b, c: linear(F.silu(linear(x, a)) * linear(x, c), b)), {**SQUARE, "c": (WIDTH, WIDTH)}),
    "bilinear": ((lambda x, a, b, c: linear(linear(x, a) * linear(x, c), b)), {**SQUARE, "c": (WIDTH, WIDTH)}),
    "partly fixed gate": (
        (lambda x, a, b, c: linear(torch.cat([(y := linear(x, a))[..., :8].tanh(), y[..., 8:]], -1) * linear(x, c), b)),
        {**SQUARE, "c": (WIDTH, WIDTH)},
    ),
    "gain": between(lambda y, g: y * g, g=(WIDTH,)),
    "gain by head": between(lambda y, g: (y.unflatten(-1, (HEADS, SIZE)) * g).flatten(2), g=(HEADS, 1)),
    "gain by head of values": between(lambda y, g: (y.unflatten(-1, (HEADS, SIZE)) * linear(y, g)[..., None]).flatten(2), g=(HEADS, WIDTH)),
    "gain of the input": ((lambda x, a, b: linear(linear(x, a) * x, b)), SQUARE),
    "gain by token": ((lambda x, a, b: linear(linear(x, a) * x[..., :1], b)), SQUARE),
    "inverse": between(lambda y: 1 / (y.square() + 1)),
    "quotient": ((lambda x, a, b: linear(linear(x, a) / (linear(x, b) + 9), b)), SQUARE),
    "offset": between(lambda y, c: torch.add(y, c, alpha=2) - 3 * c, c=(WIDTH,)),
    "position table": between(lambda y, c: y + c[: y.shape[1]], c=(9, WIDTH)),
    "sum with the input": ((lambda x, a, b: linear(linear(x, a) + x, b)), SQUARE),
    "sum with a number": between(lambda y: y + 1),
    "sum of a row": between(lambda y: y + y[..., :1]),
    "whole numbers": between(lambda y: y.long().double()),
    "softmax": between(lambda y: y.softmax(-1)),
    "running sum": between(lambda y: y.cumsum(1)),
    "like": between(lambda y: y + torch.zeros_like(y) + y.new_zeros(WIDTH)),
    # structure
    "turned": between(turned),
    "turned and summed": between(lambda y: y + turned(y)),
    "scrambled": between(lambda y: y.mT.reshape(y.shape)),
    "folded tokens": between(lambda y: y.reshape(-1, WIDTH).unflatten(0, (y.shape[0], y.shape[1]))),
    "heads folded into the batch": between(
        lambda y: joined(torch.relu(heads(y).reshape(-1, y.shape[1], SIZE)).reshape(y.shape[0], HEADS, y.shape[1], SIZE))
    ),
    "heads first in the batch": between(
        lambda y: (
            torch.relu(heads(y).transpose(0, 1).reshape(-1, y.shape[1], SIZE))
            .reshape(y.shape[0], HEADS, y.shape[1], SIZE)
            .transpose(1, 2)
            .flatten(2)
        )
    ),
    "copies with gains": between(lambda y, c: (y[..., None, :] * c).flatten(2).unflatten(-1, (4, WIDTH)).sum(-2), c=(4, 1)),
    "read in copies": (
        (lambda x, a, b, c: linear((linear(x, a)[..., None, :] * c).flatten(2), b)),
        {**SQUARE, "b": (WIDTH, 64), "c": (4, 1)},
    ),
    "read in interleaved copies": (
        (lambda x, a, b, c: linear((linear(x, a)[..., None] * c).flatten(2), b)),
        {**SQUARE, "b": (WIDTH, 64), "c": (4,)},
    ),
    "read mirrored": (
        (lambda x, a, b: linear(torch.stack([y := linear(x, a), 2 * y.flip(-1)], -1).flatten(2), b)),
        {**SQUARE, "b": (WIDTH, 32)},
    ),
    "shuffled halves": between(lambda y: torch.cat([shuffled_halves(y)] * 2, -1)),
    "halves": between(lambda y: torch.cat([(torch.relu(y[..., :8]) * y[..., 8:])] * 2, -1)),
    "interleaved halves": between(lambda y: torch.cat([(torch.relu(y[..., ::2]) * y[..., 1::2])] * 2, -1)),
    "joined with the input": ((lambda x, a, b: linear(torch.cat([linear(x, a)[..., :8], x[..., :8]], -1), b)), SQUARE),
    "joined along tokens": between(lambda y: torch.cat([y, 2 * y.flip(1)], 1)),
    "joined with learned tokens": between(lambda y, c: torch.cat([y, linear(y[:, :1], c)], 1), c=(WIDTH, WIDTH)),
    "masked": ((lambda x, a, b: linear(linear(x, a).masked_fill(x[..., :1] > 0, 0.0), b)), SQUARE),
    "masked by channel": ((lambda x, a, b: linear(linear(x, a).masked_fill(x > 0, 0.0), b)), SQUARE),
    "masked by a number": ((lambda x, a, b: linear(linear(x, a).masked_fill(x[..., :1] > 0, 7.0), b)), SQUARE),
    "summed heads": between(lambda y: torch.cat([y.unflatten(-1, (HEADS, SIZE)).sum(-2)] * 4, -1)),
    "summed tokens": between(lambda y: y - y.mean(1, True)),
    "summed channels": between(lambda y: y * y.sum(-1, True)),
    "last token": between(lambda y: y[:, -1]),
    "picked tokens": between(lambda y: y[:, torch.tensor([1, 0, 1])]),
    "picked channels": between(lambda y: y[..., torch.arange(15, -1, -1)]),
    "repeated heads": (
        (lambda x, a, b: linear(heads(linear(x, a), 2).repeat_interleave(2, 1).transpose(1, 2).flatten(2), b)),
        {**SQUARE, "a": (8, WIDTH)},
    ),
    "repeated channels": ((lambda x, a, b: linear(linear(x, a).repeat(1, 1, 2), b)), {**SQUARE, "a": (8, WIDTH)}),
    "hadamard": between(lambda y: HADAMARD(y, 4)),
    # stored tensors
    "experts": between(lambda y, c: (y.flatten(0, 1)[None].expand(3, -1, -1) @ c).sum(0).view(y.shape), c=(3, WIDTH, WIDTH)),
    "one expert": between(lambda y, c: linear(y, c[1]) + y @ c[2].T, c=(3, WIDTH, WIDTH)),
    "picked experts": between(lambda y, c: torch.relu(c[(y[:, 0, 0] > 0).long()] @ y.mT).mT, c=(3, WIDTH, WIDTH)),
    "part of a weight": between(lambda y, c: linear(y, c[:WIDTH]), c=(20, WIDTH)),
    "half of an axis": between(lambda y, c: linear(y, c[:, :WIDTH]), c=(WIDTH, 20)),
    "scaled weight": between(lambda y, c: linear(y, c[0] * 2), c=(3, WIDTH, WIDTH)),
}
