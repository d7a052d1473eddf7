"""`Encoding`: how a tensor is stored, as a value without tensors, with one text form everywhere."""

import re
from dataclasses import dataclass

from ir.errors import OptionError


@dataclass(frozen=True)
class Int:
    """Integers of `bits` bits, 1 to 8."""

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"an integer format has 1 to 8 bits, not {self.bits}")


@dataclass(frozen=True)
class Float:
    """Eight-bit floats with `exponent` and `mantissa` bits: (4, 3) or (5, 2)."""

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in {(4, 3), (5, 2)}:
            raise OptionError(f"no 8-bit float has {self.exponent} exponent and {self.mantissa} mantissa bits; there are f8e4m3 and f8e5m2")

    @property
    def bits(self) -> int:
        """Width of one element."""
        return 1 + self.exponent + self.mantissa


# Eight axes and sizes below 10¹⁰ are more than any tensor has: longer text may come from anybody, and is none of ours.
_TEXT = re.compile(r"(?:([iu])([1-8])|f8e([45])m([32]))\[(-?[0-9]{1,10}(?:,-?[0-9]{1,10}){0,7})\](dynamic(?:\*(0\.[0-9]{1,20}))?)?")


@dataclass(frozen=True)
class Encoding:
    """A number format and the block of elements that shares one scale.

    Text form: `i4[1,128]`. The letter is `i` (symmetric: no zero point), `u` (asymmetric: unsigned with a zero point) or
    `f8e4m3`/`f8e5m2`. The block is aligned to the trailing axes; -1 is the whole axis; the first entry extends to all axes further
    left. So `[-1]` is one scale per tensor, `[1,-1]` one per output channel of a weight and one per token of an activation, `[1,128]`
    groups of 128 along the last axis. The suffix `dynamic` means that scales are computed from the tensor at run time; `dynamic*0.9`
    that they cover 0.9 of its extremes, and clip what lies beyond.

    Raises:
        OptionError: a block size that is neither positive nor -1, an asymmetric float, or a clip that is no ratio, of scales not dynamic.
    """

    format: Int | Float
    block: tuple[int, ...]
    symmetric: bool = True
    dynamic: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.block or any(size == 0 or size < -1 for size in self.block):
            raise OptionError(f"a block's sizes are positive, or -1 for a whole axis, not {list(self.block)}")
        if isinstance(self.format, Float) and not self.symmetric:
            raise OptionError("floating-point encodings have no zero point")
        if self.format.bits == 1 and not self.symmetric:
            raise OptionError("one bit stores a sign, which has no zero point; use i1")
        object.__setattr__(self, "clip", round(self.clip, 4))
        if not 0 < self.clip <= 1 or (self.clip != 1 and not self.dynamic):
            raise OptionError(f"a clip is a ratio above 0 and up to 1, of dynamic scales, not {self.clip}")

    def __str__(self) -> str:
        if isinstance(self.format, Float):
            name = f"f8e{self.format.exponent}m{self.format.mantissa}"
        else:
            name = f"{'i' if self.symmetric else 'u'}{self.format.bits}"
        clip = f"*{self.clip:.4f}".rstrip("0") if self.clip != 1 else ""
        return f"{name}[{','.join(map(str, self.block))}]{'dynamic' if self.dynamic else ''}{clip}"

    @classmethod
    def parse(cls, text: str) -> "Encoding":
        """The encoding that `text` states; the exact inverse of `str`.

        Raises:
            OptionError: `text` is not an encoding.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise OptionError(
                f"{text[:200]!r} is not an encoding", remedy="write for example i8[1,-1], u4[1,64], f8e4m3[-1] or i8[1,-1]dynamic"
            )
        letter, bits, exponent, mantissa, block, dynamic, clip = match.groups()
        number = Int(int(bits)) if letter else Float(int(exponent), int(mantissa))
        return cls(number, tuple(map(int, block.split(","))), symmetric=letter != "u", dynamic=bool(dynamic), clip=float(clip or 1))

    @property
    def bits(self) -> int:
        """Width of one element, without scale and zero point."""
        return self.format.bits

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's size along every axis of a tensor of `shape`."""
        full = (self.block[0],) * (len(shape) - len(self.block)) + self.block[-len(shape) :] if shape else ()
        return tuple(max(size, 1) if block == -1 else min(block, max(size, 1)) for size, block in zip(shape, full, strict=True))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`: the number of blocks along each axis, the last one possibly ragged."""
        return tuple(-(-size // block) for size, block in zip(shape, self.block_shape(shape), strict=True))
