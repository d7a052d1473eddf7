"""The choice of scales and codes inside kernels, bit for bit that of `ir.numerics` in float32.

Divisions round to nearest, and kernels that use these functions are compiled without fused multiply-add: a product that
is rounded in `ir.numerics` is rounded here. Values are rounded half to even by adding and subtracting `1.5 · 2^23`, exact below `2^22`;
scaled values are below `127.5 / 0.0001`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backends.triton_gpu.kernels.interpreter import INTERPRETED
from ir.encoding import Encoding, Int
from ir.errors import OptionError
from ir.numerics import TINY, TINY_HALF, code_range

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TINY, _TINY_HALF = tl.constexpr(TINY), tl.constexpr(TINY_HALF)
_MAGIC = tl.constexpr(12582912.0)


@dataclass(frozen=True)
class Codes:
    """What a kernel must know of an encoding: the range of codes, the extremes' place in scales, and the clip."""

    least: int
    greatest: int
    reach: float
    clip: float
    symmetric: bool

    @classmethod
    def of(cls, encoding: Encoding, dtype: torch.dtype) -> "Codes":
        """Those of a dynamic encoding with scales along the last axis, for values of `dtype`.

        Raises:
            OptionError: the kernels have no such encoding or dtype.
        """
        one = encoding.bits > 1 and isinstance(encoding.format, Int) and encoding.dynamic and not any(b != 1 for b in encoding.block[:-1])
        if not one or (len(encoding.block) == 1 and encoding.block != (1,)):
            raise OptionError(
                f"no kernel chooses codes of {encoding}", remedy="they are dynamic integers of 2 to 8 bits in blocks of the last axis"
            )
        if dtype not in DTYPES:
            raise OptionError(f"kernels choose codes of float16, bfloat16 and float32, not of {dtype}")
        least, greatest = code_range(encoding)
        reach = (greatest + 0.5) / encoding.clip if encoding.symmetric else float(greatest)
        return cls(least, greatest, reach, encoding.clip, encoding.symmetric)


@triton.jit
def rounded(x):
    """The nearest integers, halves to even ones."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def extremes(x, AXIS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The least and the greatest of values and zero along an axis, or of all if None; the greatest magnitude, twice, if symmetric."""
    if SYMMETRIC:
        high = tl.max(tl.abs(x), AXIS)
        return high, high
    return tl.minimum(tl.min(x, AXIS), 0.0), tl.maximum(tl.max(x, AXIS), 0.0)


@triton.jit
def scale_of(low, high, REACH: tl.constexpr, CLIP: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr):
    """Scales that reach from `low` to `high`, in float32; `HALF`: as float16 stores them."""
    if SYMMETRIC:
        scale = tl.div_rn(high, REACH)
    else:
        scale = tl.div_rn(high * CLIP - low * CLIP, REACH)
    if HALF:
        return tl.minimum(tl.maximum(scale, _TINY_HALF), 65504.0).to(tl.float16).to(tl.float32)
    return tl.maximum(scale, _TINY)


@triton.jit
def zero_of(low, scale, CLIP: tl.constexpr, GREATEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Zero points, in float32; zeros if symmetric."""
    if SYMMETRIC:
        return scale * 0.0
    return tl.minimum(tl.maximum(rounded(tl.div_rn(-(low * CLIP), scale)), 0.0), GREATEST * 1.0)


@triton.jit
def inverse_of(scale):
    """The reciprocals that `codes_of` takes: a division per scale, none per value."""
    return tl.div_rn(1.0, scale)


@triton.jit
def codes_of(x, scale, inverse, zero, LEAST: tl.constexpr, GREATEST: tl.constexpr):
    """The nearest codes, int32.

    A quotient is a product with the reciprocal, corrected once by what that leaves: to nearest (Markstein, 1990).
    """
    if INTERPRETED:
        quotient = tl.div_rn(x, scale)  # its fused multiply-add rounds twice
    else:
        guess = x * inverse
        quotient = tl.fma(tl.fma(-guess, scale, x), inverse, guess)
    return tl.minimum(tl.maximum(rounded(quotient) + zero, LEAST * 1.0), GREATEST * 1.0).to(tl.int32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """`x`, float32, in `dtype`, to nearest, halves to even; the interpreter's cast to bfloat16 cuts."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
