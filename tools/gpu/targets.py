"""What kernels are to reach, as data: the formats and shapes that are timed, and ratios to torch in bfloat16 on the same GPU.

A ratio is the time of torch's product of bfloat16 matrices over the kernel's, medians, in a CUDA graph, with weights that no cache holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

TOKENS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Format:
    """How a weight is stored, and what it is multiplied with: activations in 16 bits or 8."""

    name: str
    bits: int
    activations: int
    group: int = -1  # consecutive inputs that share a scale; all of a row's if -1


FORMATS = {
    each.name: each
    for each in (
        Format("W4A16", 4, 16, 128),
        Format("W8A16", 8, 16, 128),
        Format("W3A16", 3, 16, 128),
        Format("W2A16", 2, 16, 128),
        Format("W1A16", 1, 16, 128),
        Format("W4A8", 4, 8),  # 4-bit activations are int8 here, as no tensor core of Hopper is narrower: W4A4 is this
        Format("W8A8", 8, 8),
    )
}


@dataclass(frozen=True)
class Row:
    """Ratios by tokens, of a format at shapes `(K, N)`, and the greater ones to stretch for."""

    format: str
    shapes: tuple[tuple[int, int], ...]
    least: Mapping[int, float]
    stretch: Mapping[int, float]


# From 1024 tokens on, the first ratio is of the fused kernel, and 0.9 of weights dequantized for torch's product.
ROWS = (
    Row("W4A16", ((4096, 4096),), {1: 1.8, 16: 1.7, 64: 1.2, 256: 0.85, 1024: 0.7, 4096: 0.9}, {1: 2.2}),
    Row("W4A16", ((8192, 8192), (4096, 14336)), {1: 2.6, 16: 2.4, 64: 1.6, 256: 0.9, 1024: 0.7, 4096: 0.9}, {1: 3.0}),
    Row("W4A16", ((16384, 16384),), {1: 3.0, 16: 2.7, 64: 1.8, 256: 0.9, 1024: 0.7, 4096: 0.9}, {1: 3.4}),
    Row("W8A16", ((8192, 8192),), {1: 1.6, 16: 1.6, 64: 1.3, 256: 0.9, 1024: 0.7, 4096: 0.9}, {1: 1.8}),
    Row("W3A16", ((8192, 8192),), {1: 2.6, 16: 2.3, 64: 1.4, 256: 0.8, 4096: 0.9}, {1: 3.3}),
    Row("W2A16", ((8192, 8192),), {1: 3.2, 16: 2.8, 64: 1.5, 256: 0.8, 4096: 0.9}, {1: 4.2}),
    Row("W4A8", ((8192, 8192),), {1: 2.4, 16: 2.4, 64: 1.6, 256: 1.3, 1024: 1.3, 4096: 1.3}, {1024: 1.5, 4096: 1.5}),
)
NO_TARGET = (Row("W1A16", ((8192, 8192),), {}, {}), Row("W8A8", ((8192, 8192),), {}, {}))  # timed beside them

WIDE = (8192, 8192)
BANDWIDTH = {"W8A16": 0.80, "W4A16": 0.65, "W2A16": 0.45}  # share of the copy's bytes a second, one token, WIDE
AGAINST = {"gemlite": (1.3, 64), "humming": (0.9, 16)}  # ratio of times, up to so many tokens; humming continues Marlin
NEVER_SLOWER = ("W1A16", "W2A16")  # the first than the second, one token
ROTATION_US, ROTATION_SHARE = 3.0, 0.10  # a Hadamard transform with quantization: few tokens; share of the product at 4096
ROTATION_TOKENS = (1, 16, 256, 4096)
FEW = 16  # tokens, up to which ROTATION_US holds

TORCH, OURS = "torch bf16", "fxpress"
BF16, ROTATION = "bf16", "Hadamard + quantize"  # formats: of torch's products, and of what is no product


@dataclass(frozen=True)
class Key:
    """One thing that is timed; `who` is OURS, TORCH or a peer."""

    format: str
    K: int
    N: int
    M: int
    who: str

    def __str__(self) -> str:
        shape = f"{self.K} × {self.N}" if self.N else f"{self.K} channels"
        return f"{self.format}, {shape}, M = {self.M}"


def problems(tokens: Iterable[int] = TOKENS) -> Iterator[tuple[Format, int, int, int]]:
    """Format, K, N, M of all that is timed, the most telling tokens first."""
    order = sorted(tokens, key=lambda m: (m not in (1, 16), m))
    for m in order:
        for row in (*ROWS, *NO_TARGET):
            for k, n in row.shapes:
                yield FORMATS[row.format], k, n, m


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured. `goal` is the least, or the most if `below`; `stretch` the one to stretch for."""

    words: str
    goal: float
    measured: float
    key: Key
    stretch: float | None = None
    below: bool = False
    who: str = ""  # beside whom

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.below else '≥'} {self.goal:g}" + (f" ({self.stretch:g})" if self.stretch else "")

    @property
    def reached(self) -> float:
        """Share of the goal: 1 or more if it is met."""
        return self.goal / self.measured if self.below else self.measured / self.goal

    @property
    def said(self) -> str:
        """In a word."""
        if self.reached < 1:
            return "**missed**"
        return "met, stretched" if self.stretch and self.measured >= self.stretch else "met"


def verdicts(times: Mapping[Key, float], shares: Mapping[Key, float]) -> list[Verdict]:
    """Every target of which both sides were measured.

    Args:
        times: microseconds.
        shares: of the copy's bytes a second.
    """
    return [*_ratios(times), *_bandwidths(shares), *_peers(times), *_widths(times), *_rotations(times)]


def _ratios(times: Mapping[Key, float]) -> Iterator[Verdict]:
    for row in ROWS:
        for k, n in row.shapes:
            for m, least in row.least.items():
                ours, theirs = Key(row.format, k, n, m, OURS), Key(BF16, k, n, m, TORCH)
                if ours in times and theirs in times:
                    yield Verdict(f"{ours}, against torch bf16", least, times[theirs] / times[ours], ours, row.stretch.get(m), who=TORCH)


def _bandwidths(shares: Mapping[Key, float]) -> Iterator[Verdict]:
    for name, least in BANDWIDTH.items():
        key = Key(name, *WIDE, 1, OURS)
        if key in shares:
            yield Verdict(f"{key}, share of copy bandwidth", least, shares[key], key)


def _peers(times: Mapping[Key, float]) -> Iterator[Verdict]:
    for key, theirs in times.items():
        least, most = AGAINST.get(key.who, (0.0, 0))
        ours = Key(key.format, key.K, key.N, key.M, OURS)
        if ours in times and key.M in range(most + 1):
            yield Verdict(f"{ours}, against {key.who}", least, theirs / times[ours], ours, who=key.who)


def _widths(times: Mapping[Key, float]) -> Iterator[Verdict]:
    narrow, wide = (Key(name, *WIDE, 1, OURS) for name in NEVER_SLOWER)
    if narrow in times and wide in times:
        yield Verdict(f"{narrow}, against {wide.format}", 1.0, times[wide] / times[narrow], narrow)


def _rotations(times: Mapping[Key, float]) -> Iterator[Verdict]:
    for key, found in times.items():
        if (key.format, key.who) != (ROTATION, OURS):
            continue
        if key.M in range(FEW + 1):
            yield Verdict(f"{key}, µs", ROTATION_US, found, key, below=True)
        product = Key("W4A8", *WIDE, key.M, OURS)
        if product in times and key.M in ROTATION_TOKENS[-1:]:
            yield Verdict(f"{key}, share of the W4A8 product", ROTATION_SHARE, found / times[product], key, below=True)
