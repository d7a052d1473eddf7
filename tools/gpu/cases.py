"""Which uses of the operators are checked, and the processes that check them.

`LARGE` ones are for a GPU: up to 4096 tokens. `SMALL` ones cost a CPU little, with the same variety.
"""

import itertools
import multiprocessing
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import NamedTuple

import torch

from tools.gpu.checks import Case, Linear, check, described
from tools.gpu.checks_rows import Cache, Hadamard, Rows
from tools.gpu.timing import Budget

HALVES = (torch.float16, torch.bfloat16)
TOKENS = (1, 2, 7, 16, 17, 33, 64, 100, 256, 1000, 4096)
# N, K, group: full tiles, ragged ends of either, one scale a row, more rows than columns
SHAPES = (
    (256, 1024, 128),
    (72, 640, 64),
    (1000, 4096, 4096),
    (136, 96, 32),
    (512, 1000, 128),
    (24, 4096, 64),
    (4096, 512, 512),
    (129, 1536, 128),
)
SMALL_TOKENS, SMALL_SHAPES = (1, 7, 16, 33), ((32, 128, 32), (24, 96, 32), (17, 200, 64), (8, 256, 256))
OF_ROWS = ("i8[1,-1]dynamic", "u8[1,-1]dynamic", "i4[1,-1]dynamic", "u8[1,-1]dynamic*0.9", "i8[1,-1]dynamic*0.95")
OF_CACHE = ("u4[1,32]dynamic", "i8[1,-1]dynamic", "u2[1,32]dynamic", "i4[1,64]dynamic", "u8[1,-1]dynamic", "u3[1,32]dynamic")
BLOCKS = ((512, 512), (768, 64), (4096, 4096), (11008, 64), (14336, 14336), (640, 128), (8192, 8192))  # channels, block
LOST = re.compile("CUDA error|illegal memory|misaligned address")  # after which a GPU answers its process nothing any more
LENGTHS = ((2, 3, 5, 64), (1, 8, 1, 128), (2, 2, 33, 64))  # batch, heads, positions, width


class Cases(NamedTuple):
    """What is varied."""

    tokens: Sequence[int]
    shapes: Sequence[tuple[int, int, int]]
    blocks: Sequence[tuple[int, int]]


LARGE = Cases(TOKENS, SHAPES, BLOCKS)
SMALL = Cases(SMALL_TOKENS, SMALL_SHAPES, ((64, 64), (96, 32), (512, 512)))


def cases(of: Cases) -> Iterator[Case]:
    """All that is checked: every width, dtype and number of tokens; what else there is, is drawn, always alike."""
    draw = random.Random(0)
    for bits, dtype, M in itertools.product(range(1, 9), HALVES, of.tokens):
        yield Linear(bits, M, *draw.choice(of.shapes), dtype, zero=draw.random() < 0.4, bias=draw.random() < 0.5)
    for bits, M in itertools.product(range(1, 9), of.tokens):
        dtype, lows = draw.choice((*HALVES, torch.float32)), {"input_bits": draw.choice((8, 8, 4)), "per_tensor": draw.random() < 0.2}
        zeros = {"zero": draw.random() < 0.4, "input_zero": draw.random() < 0.5, "bias": draw.random() < 0.5}
        yield Linear(bits, M, *draw.choice(of.shapes), dtype, int8=True, **zeros, **lows)
    for encoding, M, dtype in itertools.product(OF_ROWS, of.tokens, HALVES):
        K, block = draw.choice(of.blocks)
        yield Rows(M, K, encoding, dtype)
        yield Rows(M, K, encoding, dtype, block=block)
        yield Rows(M, K, encoding, dtype, norm=True, weight=draw.random() < 0.7)
    for (K, block), dtype in itertools.product(of.blocks, HALVES):
        yield Hadamard(draw.choice(of.tokens), K, block, dtype)
    for encoding, dtype in itertools.product(OF_CACHE, (*HALVES, torch.float32)):
        yield Cache(draw.choice(LENGTHS), encoding, dtype, draw.choice((None, torch.float16)))


class Outcome(NamedTuple):
    """A case, and what is wrong, empty if nothing is; whether an error was raised."""

    case: str
    wrong: str
    raised: bool = False


def outcome(case: Case, seed: int, device: torch.device) -> Outcome:
    """Of a check; what an operator raises is wrong too."""
    try:
        return Outcome(described(case), check(case, seed, device))
    except Exception as error:
        return Outcome(described(case), f"{type(error).__name__}: {error}", raised=True)


def run(found: Iterable[Case], seed: int, device: torch.device, workers: int, budget: Budget) -> list[Outcome]:
    """Every case's outcome, in order. In several processes, since most of the time compilers run; in this one if `workers` is 0.

    A process that dies or hangs takes its outcomes with it: they are reported as wrong.
    """
    every = list(found)
    seeds = [seed + index for index in range(len(every))]
    if not workers:
        return _part(every, seeds, device)
    outcomes: dict[int, Outcome] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [range(first, len(every), workers) for first in range(workers)]
        waiting = [pool.submit(_part, [every[i] for i in part], [seeds[i] for i in part], device) for part in parts]
        for part, future in zip(parts, waiting, strict=True):
            try:
                outcomes |= dict(zip(part, future.result(max(budget.left, 1)), strict=True))
            except (BrokenExecutor, TimeoutError) as error:
                outcomes |= {i: Outcome(described(every[i]), f"its process ended: {type(error).__name__} {error}") for i in part}
                for process in multiprocessing.active_children():
                    process.kill()
    return [outcomes[i] for i in range(len(every))]


def _part(part: list[Case], seeds: list[int], device: torch.device) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for case, seed in zip(part, seeds, strict=True):
        lost = bool(outcomes) and LOST.search(outcomes[-1].wrong)
        outcomes.append(Outcome(described(case), f"not run, after: {lost[0]}", raised=True) if lost else outcome(case, seed, device))
    return outcomes
