"""From words of packed codes to operands of a matrix product: the instructions, made for a width, a dtype and an offset.

A 32-bit register holds two containers, of neighbouring `k`, so that one instruction acts on two weights. Codes become numbers by the
known trick of or-ing their bits into the mantissa of a power of two, `BASE + 2^place · u`, and one multiply-add takes out what was put in:

    float16   BASE = 1024, 10 bits of mantissa: a code of 4 bits is found at two places of a word without a shift
    bfloat16  BASE = 128, 7 bits of mantissa: more shifts; codes of 8 bits by way of their sign

Every intermediate value is exact, which `tests/` shows by running the instructions on all codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from backends.triton_gpu import layout
from ir.errors import OptionError

CONTAINER = 16
BOTH = 0x10001  # a 16-bit constant in both halves of a register
OR, XOR = 0xEA, 0x6A  # lop3's tables of (a & b) | c and (a & b) ^ c


@dataclass(frozen=True)
class Kind:
    """How numbers of 16 bits are made of codes."""

    suffix: str  # of instructions on two of them
    mantissa: int
    exponent: int  # the bias of a number's exponent field

    @property
    def base(self) -> int:
        """Greatest power of two in whose binade integers are exact down to the last place."""
        return int(2**self.mantissa)

    def bits(self, value: float) -> int:
        """The bits of a number that is a short sum of powers of two, in both halves of a register."""
        if value == 0:
            return 0
        size, power = abs(value), 0
        while size >= 2:
            size, power = size / 2, power + 1
        while size < 1:
            size, power = size * 2, power - 1
        fraction = (size - 1) * 2**self.mantissa
        if fraction != int(fraction):
            raise OptionError(f"{value} is not a number of {self.suffix}")
        word = (int(value < 0) << 15) | ((power + self.exponent) << self.mantissa) | int(fraction)
        return word * BOTH


KINDS = {"float16": Kind("f16x2", 10, 15), "bfloat16": Kind("bf16x2", 7, 127)}


@dataclass(frozen=True)
class Term:
    """One plane's bits of a chunk: which word, how far it is shifted right, where in the mantissa they then lie, and their factor."""

    word: int
    shift: int
    place: int
    bits: int
    factor: float


@dataclass(frozen=True)
class Chunk:
    """How 32 consecutive `k` are made: the sum of terms and a constant; the offset is in the constant, or subtracted last."""

    terms: tuple[Term, ...]
    constant: float
    folded: bool


def span(bits: int) -> int:
    """Consecutive `k` that whole words of all planes cover."""
    return max(layout.span(plane, CONTAINER) for plane in layout.PLANES[bits])


def words(bits: int) -> list[int]:
    """How many words of each plane make a span."""
    return [span(bits) // layout.span(plane, CONTAINER) for plane in layout.PLANES[bits]]


def chunks(bits: int, kind: Kind, offset: float) -> list[Chunk]:
    """All chunks of a span.

    Raises:
        OptionError: `u − offset` cannot be made exactly: the offset is not an integer, nor a half of a narrow width.
    """
    shifted: set[tuple[int, int]] = set()
    made = []
    for index in range(span(bits) // layout.LANES):
        options = [chunk for chunk in _options(bits, index, kind, offset) if chunk is not None]
        if not options or offset * 2 != int(offset * 2):
            raise _inexact(bits, offset)
        best = min(options, key=lambda chunk: (not chunk.folded, len({(t.word, t.shift) for t in chunk.terms if t.shift} - shifted)))
        shifted |= {(t.word, t.shift) for t in best.terms}
        made.append(best)
    return made


def _inexact(bits: int, offset: float) -> OptionError:
    what = f"no 16-bit numbers are made of codes of {bits} bits less {offset}"
    return OptionError(what, remedy="one zero point of all weights is an integer, or a half of few bits; others are given as a tensor")


def _options(bits: int, index: int, kind: Kind, offset: float) -> Iterable[Chunk | None]:
    lowest = int(offset != int(offset))  # a half needs a bit below the last place of whole numbers
    places: list[list[Term]] = []
    first = 0
    for plane, weight, count in zip(layout.PLANES[bits], layout.shifts(bits), words(bits), strict=True):
        per_word = layout.slots(plane, CONTAINER)
        at = index % per_word * plane
        reach = range(lowest, kind.mantissa - plane + 1)
        places.append([Term(first + index // per_word, at - place, place, plane, 2.0 ** (weight - place)) for place in reach])
        first += count
    for terms in product(*places):
        yield _checked(terms, kind, offset)


def _checked(terms: tuple[Term, ...], kind: Kind, offset: float) -> Chunk | None:
    """The chunk, if every sum on the way is exact."""
    limit = 2 * kind.base * (0.5 if offset != int(offset) else 1.0)
    bases = sum(term.factor * kind.base for term in terms)
    if bases + offset <= limit:
        return Chunk(terms, -bases - offset, folded=True)
    if bases <= limit and offset <= limit:
        return Chunk(terms, -bases, folded=False)
    return None


@lru_cache(maxsize=256)
def assembly(bits: int, dtype: str, offset: float) -> tuple[str, str]:
    """The inline assembly that makes a span's chunks, `u − offset` as `dtype`, of its words, two weights at a time; and its constraints.

    Outputs are the chunks in the order of `k`; inputs are the words of all planes, lowest plane first.
    """
    kind, count = KINDS[dtype], span(bits) // layout.LANES
    inputs = sum(words(bits))
    make = _signed if bits == 8 and kind.mantissa == 7 else _sum
    lines = [f"mov.b32 w{word}, ${count + word};" for word in range(inputs)] + make(bits, kind, offset)
    names = sorted({token.strip(" ,;") for line in lines for token in line.split()[1:] if token[0] in "whtc"})
    text = "{\n.reg .b32 " + ", ".join(names) + ";\n" + "\n".join(dict.fromkeys(lines)) + "\n}"
    return text, ",".join(["=r"] * count + ["r"] * inputs)


def _sum(bits: int, kind: Kind, offset: float) -> list[str]:
    lines = []
    for index, chunk in enumerate(chunks(bits, kind, offset)):
        last = f"c{index}"
        lines += [f"mov.b32 {last}, {kind.bits(chunk.constant):#x};"]
        for place, term in enumerate(chunk.terms):
            number, factor, result = f"t{index}_{place}", f"c{index}_{place}f", f"c{index}_{place}"
            lines += _number(term, kind, number)
            lines += [f"mov.b32 {factor}, {kind.bits(term.factor):#x};", f"fma.rn.{kind.suffix} {result}, {number}, {factor}, {last};"]
            last = result
        if not chunk.folded:
            lines += _plus(kind, f"c{index}_z", last, -offset)
            last = f"c{index}_z"
        lines += [f"mov.b32 ${index}, {last};"]
    return lines


def _plus(kind: Kind, result: str, name: str, value: float) -> list[str]:
    """A sum, as a multiply-add: sm_80 has no other for bfloat16."""
    constants = [f"mov.b32 c_one, {kind.bits(1.0):#x};", f"mov.b32 {result}_by, {kind.bits(value):#x};"]
    return [*constants, f"fma.rn.{kind.suffix} {result}, {name}, c_one, {result}_by;"]


def _number(term: Term, kind: Kind, name: str) -> list[str]:
    """`BASE + 2^place · u` of a word's bits."""
    base = kind.bits(kind.base)
    if term.bits == 8 and term.place == 0:  # whole bytes, put beside the upper byte of the base
        bytes_of = 0x7250 if term.shift == 0 else 0x7351
        return [f"mov.b32 c_base, {base:#x};", f"prmt.b32 {name}, w{term.word}, c_base, {bytes_of:#x};"]
    word, lines = _shifted(term.word, term.shift)
    mask = (2**term.bits - 1) << term.place
    return [*lines, f"lop3.b32 {name}, {word}, {mask * BOTH:#x}, {base:#x}, {OR:#x};"]


def _shifted(word: int, shift: int) -> tuple[str, list[str]]:
    """A word shifted right; what comes from the other half lies outside of every mask."""
    if shift == 0:
        return f"w{word}", []
    name, operation = f"h{word}_{shift}".replace("-", "m"), "shr.u32" if shift > 0 else "shl.b32"
    return name, [f"{operation} {name}, w{word}, {abs(shift)};"]


def _signed(bits: int, kind: Kind, offset: float) -> list[str]:
    """8 bits as bfloat16: `(128 + the lower seven) + (−256 or −128 by the uppermost)` is `u − 128`, and the rest of the offset follows."""
    if offset != int(offset):
        raise _inexact(bits, offset)
    lines = []
    for index in range(2):
        word, shifting = _shifted(0, bits * index)
        lines += [*shifting, f"lop3.b32 t{index}, {word}, {0x7F * BOTH:#x}, {kind.bits(128.0):#x}, {OR:#x};"]
        lines += [f"lop3.b32 c{index}_s, {word}, {0x80 * BOTH:#x}, {kind.bits(-256.0):#x}, {XOR:#x};"]
        lines += [f"mov.b32 c_one, {kind.bits(1.0):#x};", f"fma.rn.{kind.suffix} c{index}, t{index}, c_one, c{index}_s;"]
        last = f"c{index}"
        if offset != 128:
            lines += _plus(kind, f"{last}_u", last, 128 - offset)
            last = f"{last}_u"
        lines += [f"mov.b32 ${index}, {last};"]
    return lines
