"""Cases of operators on tokens and caches: Hadamard transforms, norms and quantization, against float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.triton_gpu.ops import cache, rows
from ir import numerics, ops, packing
from ir.encoding import Encoding
from ir.hadamard import factors
from tools.gpu.checks import Inputs, apart

SLACK = 1e-3  # of a code, beyond a half: what float32 leaves open near a tie


def misquantized(y: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, encoding: Encoding, loose: Tensor, stored: torch.dtype) -> str:
    """What is wrong with codes, scales and zero points of the float64 tensor `y`.

    Args:
        loose: how far, in codes, each place may be from a half: what was rounded before.
        stored: the dtype of scales.
    """
    wanted = numerics.choose_qparams(y, encoding)
    blocks = numerics.expand(scale.double(), encoding, tuple(y.shape))
    apart_by = ((scale.double() - wanted.scale).abs() / wanted.scale).max()
    most = max(4 * torch.finfo(stored).eps, 3 * float((loose - SLACK).max()) / 2 ** (encoding.bits - 1))
    if not apart_by <= most:
        return f"a scale is {float(apart_by):.2e} of itself away, more than {most:.2e}"
    z = torch.zeros_like(zero) if wanted.zero_point is None else wanted.zero_point
    steps = (zero.double() - z.double()).abs().max()
    if steps > (0 if encoding.symmetric else 1):
        return f"a zero point is {int(steps)} away"
    exact = (y / blocks + numerics.expand(zero.double(), encoding, tuple(y.shape))).clamp(*numerics.code_range(encoding))
    bad = ~((codes.double() - exact).abs() <= 0.5 + loose)
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        return f"{int(bad.sum())} of {bad.numel()} codes, first {list(at)}: {int(codes[at])} of {float(exact[at]):.4f}"
    return ""


@dataclass(frozen=True)
class Rows:
    """Quantization of tokens, after a Hadamard transform in blocks of `block`, or after a norm."""

    M: int
    K: int
    encoding: str
    dtype: torch.dtype
    block: int = 0
    norm: bool = False
    weight: bool = False

    def inputs(self, draw: torch.Generator) -> Inputs:
        here = {"generator": draw, "device": draw.device}
        x = torch.randn(self.M, self.K, **here)
        x[:, :: max(self.K // 3, 1)] *= 20
        weight = (0.5 + torch.rand(self.K, **here)).to(self.dtype) if self.weight else None
        return {"x": x.to(self.dtype), "weight": weight}

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        if self.block:
            return rows.HADAMARD_QUANTIZE_ROWS(given["x"], self.block, self.encoding)
        if self.norm:
            return rows.NORM_QUANTIZE_ROWS(given["x"], given["weight"], 1e-6, self.encoding)
        return rows.QUANTIZE_ROWS(given["x"], self.encoding)

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        codes, scale, zero = made
        found = [(each.dtype, tuple(each.shape)) for each in made]
        wanted = [(torch.int8, (self.M, self.K)), (torch.float32, (self.M, 1)), (torch.int8, (self.M, 1))]
        if found != wanted:
            return f"{found}, not {wanted}"
        x, encoding = given["x"].double(), Encoding.parse(self.encoding)
        y = rotated(x, self.block) if self.block else self._normed(x, given["weight"]) if self.norm else x
        lossy = torch.finfo(self.dtype).eps if self.block or self.norm else 0.0
        loose = SLACK + lossy * (y.abs() + 3 * y.square().mean(-1, keepdim=True).sqrt()) / scale.double()
        shift = 0 if encoding.symmetric else rows.SHIFT
        return misquantized(y, codes.double() + shift, scale, zero.double() + shift, encoding, loose, torch.float32)

    @staticmethod
    def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return y if weight is None else y * weight.double()


def rotated(x: Tensor, block: int) -> Tensor:
    """`x [M, K]`, float64, times Hadamard matrices, factor by factor."""
    y = x.reshape(*x.shape[:-1], -1, *(len(factor) for factor in factors(block)))
    for axis, factor in enumerate(reversed(factors(block)), 1):
        y = torch.movedim(torch.movedim(y, -axis, -1) @ factor.to(y), -1, -axis)
    return y.reshape(x.shape)


@dataclass(frozen=True)
class Hadamard:
    """The transform alone."""

    M: int
    K: int
    block: int
    dtype: torch.dtype

    def inputs(self, draw: torch.Generator) -> Inputs:
        return {"x": torch.randn(self.M, self.K, generator=draw, device=draw.device).to(self.dtype)}

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        return (ops.HADAMARD(given["x"], self.block),)

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        x = given["x"].double()
        runs = x.reshape(self.M, -1, self.block).square().mean(-1, keepdim=True).sqrt()
        return apart(made[0], rotated(x, self.block), runs.expand(-1, -1, self.block).reshape(x.shape), self.dtype)


@dataclass(frozen=True)
class Cache:
    """Keys or values in few bits: written, and read."""

    shape: tuple[int, ...]
    encoding: str
    dtype: torch.dtype
    scale_dtype: torch.dtype | None

    def inputs(self, draw: torch.Generator) -> Inputs:
        return {"x": torch.randn(self.shape, generator=draw, device=draw.device).to(self.dtype)}

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        kept = cache.QUANTIZE_CACHE(given["x"], self.encoding, self.scale_dtype)
        return *kept, cache.DEQUANTIZE_CACHE(*kept, self.encoding, self.dtype)

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        packed, scale, zero, back = made
        encoding, y = Encoding.parse(self.encoding), given["x"].double()
        codes = packing.unpack(packed, encoding).double()
        loose = torch.full_like(y, SLACK)
        if wrong := misquantized(y, codes, scale, zero, encoding, loose, self.scale_dtype or torch.float32):
            return f"written: {wrong}"
        s, z = (numerics.expand(each.double(), encoding, self.shape) for each in (scale, zero))
        values = (codes - z) * s
        wrong = apart(back, values, values.abs() + s, self.dtype)
        return f"read: {wrong}" if wrong else ""
