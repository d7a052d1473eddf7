"""What is timed: a product with a weight in many copies, and calls of our operators, each with a copy of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tools.gpu.checks import Inputs, Linear
from tools.gpu.checks_rows import Rows
from tools.gpu.targets import Format, Key
from tools.gpu.timing import copies

ENCODING = "i8[1,-1]dynamic"  # of int8 activations
JUDGED = 128  # rows of a weight that a peer is judged by
Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """A product `x [M, K]` times a weight `[N, K]`, stored as `format` says."""

    format: Format
    K: int
    N: int
    M: int
    dtype: torch.dtype

    @property
    def case(self) -> Linear:
        """The same as a case that inputs are drawn of and results are judged by."""
        group = self.K if self.format.group == -1 else self.format.group
        return Linear(self.format.bits, self.M, self.N, self.K, group, self.dtype, int8=self.format.activations == 8)

    @property
    def stored(self) -> int:
        """Bytes of the weight's codes."""
        return self.N * self.K * self.format.bits // 8

    @property
    def moved(self) -> int:
        """The fewest bytes that move: codes, scales and activations are read once, results written once."""
        int8, half = self.case.int8, self.dtype.itemsize
        scales = self.N * -(-self.K // self.case.group) * (4 if int8 else half)
        return self.stored + scales + self.M * (self.K * (1 if int8 else half) + self.N * half)

    def key(self, who: str) -> Key:
        return Key(self.format.name, self.K, self.N, self.M, who)

    def inputs(self, seed: int, device: torch.device) -> Inputs:
        return self.case.inputs(torch.Generator(device).manual_seed(seed))

    def activations(self, given: Inputs) -> Tensor:
        """`x` in the problem's dtype, of int8 codes too."""
        return (given["x"].float() * given["input_scale"]).to(self.dtype) if self.case.int8 else given["x"]

    def distance(self, given: Inputs, y: Tensor) -> float:
        """`|y − W x| / |W x|` over some rows of the weight, in float64: for peers, which may round the weight anew."""
        kept = torch.randperm(self.N)[:JUDGED].to(y.device)
        x = given["x"].double() * (given["input_scale"].double() if self.case.int8 else 1.0)
        exact = x @ self.case.values(given, kept).T
        return float((y[:, kept].double() - exact).norm() / exact.norm())


def operator(case: Linear, given: Inputs) -> Tensor:
    """What a graph calls."""
    return case.call(given)[0]


def turns(problem: Problem, given: Inputs) -> list[Inputs]:
    """Inputs with copies of the weight, as many as a graph goes round."""
    return [given | {"planes": [each.clone() for each in given["planes"]]} for _ in range(copies(problem.stored))]


def ours(problem: Problem, given: Inputs) -> list[Product]:
    """Calls of our operator, each with a copy of the weight."""
    return [partial(operator, problem.case, turn) for turn in turns(problem, given)]


def rotation(M: int, K: int, dtype: torch.dtype) -> Rows:
    """The transform with quantization that is timed; its input is the same in every call, as the operator before left it in the cache."""
    return Rows(M, K, ENCODING, dtype, block=K)
