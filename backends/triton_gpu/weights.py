"""A quantized weight as operators take it: planes of unsigned codes, scales by groups along the rows, an offset or zero points."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.sites import Weight
from backends.triton_gpu import layout
from ir.encoding import Encoding
from ir.numerics import code_range


@dataclass(frozen=True)
class Packed:
    """A weight `[N, K]` as `backends.triton_gpu.ops.linear` states it: `W[n, k] = scale[g, n] · (u[n, k] − z[g, n])`.

    Args:
        planes: of the unsigned codes `u`.
        scale: `[ceil(K / group), N]`, float16 if that holds every scale exactly, else float32.
        zero: zero points like `scale`, uint8; None where `offset` says them all.
        bits: of a code.
        group: consecutive columns that share a scale.
        offset: what a code of zero stands for, if there are no zero points.
    """

    planes: list[Tensor]
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    offset: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.planes, self.scale, self.zero) if tensor is not None)


def packed(weight: Weight, container: int) -> Packed:
    """A weight's codes in containers of 8 or 16 bits, its scales as the kernels read them."""
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    encoding, sign = weight.encoding, weight.encoding.bits == 1
    rows, group = encoding.block_shape(shape)
    least, _ = code_range(encoding)
    codes = (weight.codes.to(torch.int16) - least).to(torch.uint8)
    return Packed(
        planes=layout.pack(codes >> 1 if sign else codes, encoding.bits, container),
        scale=_narrow(_by_group(weight.scale.float() * (2 if sign else 1), rows, shape[0])),
        zero=None if weight.zero_point is None else _by_group(weight.zero_point, rows, shape[0]),
        bits=encoding.bits,
        group=group,
        offset=_offset(encoding),
    )


def _offset(encoding: Encoding) -> float:
    return 0.5 if encoding.bits == 1 else 2.0 ** (encoding.bits - 1)


def _by_group(values: Tensor, rows: int, n: int) -> Tensor:
    """`[N / rows, K / group]` as `[K / group, N]`: what several rows share is repeated."""
    return values.repeat_interleave(rows, 0)[:n].T.contiguous()


def _narrow(scale: Tensor) -> Tensor:
    """Scales in float16 if none of them is rounded by it."""
    half = scale.to(torch.float16)
    return half if bool((half.float() == scale).all()) else scale
