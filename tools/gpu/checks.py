"""Whether the operators of `backends.triton_gpu.ops` are right: against float64, on fresh random inputs, into outputs that hold no numbers.

A case makes inputs, calls its operator and judges what came. `check` does so once as it is, and once in a CUDA graph, which is captured
with some inputs and replayed with others. References are computed from codes that were never packed, by other code than the operators'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backends.triton_gpu import layout
from backends.triton_gpu.ops import linear
from tools.gpu.timing import poisoned

SAMPLED = 256  # rows of a weight that are judged, of larger ones
EASY = 2**23  # elements of a weight that is judged whole
Inputs = dict[str, Any]


class Case(Protocol):
    """One use of one operator."""

    def inputs(self, draw: torch.Generator) -> Inputs:
        """Random inputs, of shapes that are the same every time, on the generator's device."""
        ...

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        """What the operator makes of them."""
        ...

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        """What is wrong with it; empty if nothing is."""
        ...


def check(case: Case, seed: int, device: torch.device) -> str:
    """What is wrong with an operator, in words; empty if nothing is."""
    draw = torch.Generator(device).manual_seed(seed)
    given = case.inputs(draw)
    with poisoned():
        made = case.call(given)
    if wrong := case.judge(given, made):
        return wrong
    if device.type != "cuda":
        return ""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with poisoned(), torch.cuda.graph(graph):
        made = case.call(given)
    other = case.inputs(draw)
    pytree.tree_map_(lambda old, new: old.copy_(new) if isinstance(old, Tensor) else None, given, other)
    for each in made:
        each.fill_(float("nan") if each.is_floating_point() else 99)
    graph.replay()
    torch.cuda.synchronize()
    wrong = case.judge(other, made)
    return f"in a CUDA graph: {wrong}" if wrong else ""


def apart(y: Tensor, reference: Tensor, typical: Tensor, dtype: torch.dtype, slack: float = 1.0) -> str:
    """Where `y` is further from the reference than rounding to `dtype` explains, element by element and as a whole.

    Args:
        typical: root of the sum of squares of the terms that an element is the sum of; what is rounded on the way is in proportion to it.
        slack: a factor on what is allowed of it.
    """
    eps = torch.finfo(dtype).eps
    error = (y.double() - reference).abs()
    bad = ~(error <= eps * (6 * slack * typical + reference.abs()))
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        return f"{int(bad.sum())} of {bad.numel()} elements, first {list(at)}: {float(y[at]):.6g}, not {float(reference[at]):.6g}"
    whole = float(error.norm() / reference.norm())
    return "" if whole <= 2 * slack * eps else f"relative error {whole:.2e}, more than {2 * slack * eps:.2e}"


@dataclass(frozen=True)
class Linear:
    """A packed linear of `M` tokens; of int8 activations if `int8`, whose codes have `input_bits` bits."""

    bits: int
    M: int
    N: int
    K: int
    group: int
    dtype: torch.dtype
    zero: bool = False
    bias: bool = False
    int8: bool = False
    input_zero: bool = False
    input_bits: int = 8
    per_tensor: bool = False

    def inputs(self, draw: torch.Generator) -> Inputs:
        here = {"generator": draw, "device": draw.device}
        groups, most = -(-self.K // self.group), 2**self.bits
        codes = torch.randint(0, most, (self.N, self.K), dtype=torch.uint8, **here)
        scale = (0.5 + torch.rand(groups, self.N, **here)) / (most / 2)
        found: Inputs = {
            "codes": codes,
            "planes": layout.pack(codes, self.bits, 8 if self.int8 else 16),
            "scale": scale if self.int8 else scale.to(self.dtype),
            "zero": torch.randint(0, most, (groups, self.N), dtype=torch.uint8, **here) if self.zero else None,
            "bias": torch.randn(self.N, **here).to(self.dtype) if self.bias else None,
        }
        if not self.int8:
            return found | {"x": torch.randn(self.M, self.K, **here).to(self.dtype)}
        half, count = 2 ** (self.input_bits - 1), 1 if self.per_tensor else self.M
        small = {"dtype": torch.int8, **here}
        return found | {
            "x": torch.randint(-half, half, (self.M, self.K), **small),
            "input_scale": (0.5 + torch.rand(count, 1, **here)) / half,
            "input_zero": torch.randint(-half, half, (count, 1), **small) if self.input_zero else None,
        }

    @property
    def offset(self) -> float:
        return 2.0 ** (self.bits - 1) if self.bits > 1 else 0.5

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        weight = *(given[name] for name in ("planes", "scale", "zero", "bias")), self.bits, self.group, self.offset
        if self.int8:
            return (linear.PACKED_LINEAR_INT8(given["x"], given["input_scale"], given["input_zero"], *weight, self.dtype),)
        return (linear.PACKED_LINEAR(given["x"], *weight),)

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        (y,) = made
        if (tuple(y.shape), y.dtype) != ((self.M, self.N), self.dtype):
            return f"{y.dtype} {list(y.shape)}, not {self.dtype} {[self.M, self.N]}"
        if not y.isfinite().all():
            return f"{int((~y.isfinite()).sum())} of {y.numel()} elements are not finite"
        kept = torch.arange(self.N, device=y.device)
        if self.N * self.K > EASY:
            kept = kept[torch.randperm(self.N)[:SAMPLED].to(kept.device)]
        W = self.values(given, kept)
        x = given["x"].double()
        if self.int8:
            x = (x if given["input_zero"] is None else x - given["input_zero"].double()) * given["input_scale"].double()
        bias = torch.zeros((), dtype=torch.float64, device=y.device) if given["bias"] is None else given["bias"].double()[kept]
        # integers are summed exactly, and float32 holds what is left; zero points are subtracted from greater sums
        slack = 16.0 if self.int8 and self.dtype == torch.float32 else 1.0
        return apart(y[:, kept], x @ W.T + bias, (x.square() @ W.square().T + bias.square()).sqrt(), self.dtype, slack)

    def values(self, given: Inputs, kept: Tensor) -> Tensor:
        """Rows `kept` of the weight, float64 `[len(kept), K]`, from codes that were never packed."""
        of_group = torch.arange(self.K, device=kept.device) // self.group
        z = self.offset if given["zero"] is None else given["zero"].double()[:, kept][of_group].T
        return (given["codes"][kept].double() - z) * given["scale"].double()[:, kept][of_group].T


def described(case: Case) -> str:
    """A case in one line."""
    fields: Mapping[str, Any] = vars(case)
    said = ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in fields.items() if value not in (False, None))
    return f"{type(case).__name__}({said})"
