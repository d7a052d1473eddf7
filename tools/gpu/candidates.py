"""Which forms of a kernel are tried for a problem: those that the model takes for best, and those that differ from them in one field.

A kernel that can be tuned is a row of `TUNED`: its launcher, which takes a form as `config=`, where the search starts, and what is varied.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backends.triton_gpu import layout, select
from backends.triton_gpu.select import Config
from ir.errors import DataError
from tools.gpu.checks import Inputs, Linear
from tools.gpu.problems import Problem

STARTS = 2  # of the model
WHOLE_FROM = 64  # tokens from which a weight written out is tried too
CHECKED = (512, 4096)  # N, K of the weight that a form is checked with: tiles divide them, as they do the timed ones
SMALL = (16, 256)  # the same on a CPU
WHOLE = Config("dequantize")


@dataclass(frozen=True)
class Tuned:
    """A kernel with forms.

    Attributes:
        name: of the operator, as the table says it.
        launch: the launcher, given a form.
        starts: forms to begin with, for a problem and an architecture such as 90.
        varied: values that each field is given, one field at a time; and half and twice as many parts of `k`.
    """

    name: str
    launch: Callable[[Linear, Inputs, Config], Tensor]
    starts: Callable[[Problem, int], list[Config]]
    varied: Mapping[str, Sequence[object]]


def candidates(tuned: Tuned, problem: Problem, arch: int, known: Config | None = None) -> list[Config]:
    """Forms to try, none twice: those around `known`, which was the fastest once, and around the model's best."""
    starts = [*([known] if known else []), *tuned.starts(problem, arch)]
    whole = [WHOLE] if not problem.case.int8 and problem.M >= WHOLE_FROM else []
    return list(dict.fromkeys([*(form for start in starts for form in _around(start, tuned)), *whole]))


def _around(start: Config, tuned: Tuned) -> Iterator[Config]:
    """A form, and those that differ from it in one field."""
    yield start
    if start == WHOLE:
        return
    for name, values in {"split": (max(1, start.split // 2), 2 * start.split), **tuned.varied}.items():
        yield from (replace(start, **{name: value}) for value in values if value != getattr(start, name))


def architecture() -> int:
    """Of the GPU, or the nearest below that forms are counted for."""
    major, minor = torch.cuda.get_device_capability()
    return max((known for known in select.DEVICES if known <= 10 * major + minor), default=min(select.DEVICES))


def tuned_by(problem: Problem) -> Tuned:
    """The kernel that runs a problem."""
    return TUNED["packed_linear_int8" if problem.case.int8 else "packed_linear"]


@dataclass(frozen=True)
class Formed:
    """A case whose operator is launched in a given form; on a CPU it is called as it is."""

    case: Linear
    config: Config
    kernel: str

    @classmethod
    def of(cls, problem: Problem, config: Config, size: tuple[int, int] = CHECKED) -> "Formed":
        """The problem on a weight of another size `(N, K)`."""
        N, K = size
        group = K if problem.format.group == -1 else problem.format.group
        return cls(replace(problem.case, N=N, K=K, group=group), config, tuned_by(problem).name)

    def inputs(self, draw: torch.Generator) -> Inputs:
        return self.case.inputs(draw)

    def call(self, given: Inputs) -> tuple[Tensor, ...]:
        return (TUNED[self.kernel].launch(self.case, given, self.config),) if given["x"].is_cuda else self.case.call(given)

    def judge(self, given: Inputs, made: tuple[Tensor, ...]) -> str:
        return self.case.judge(given, made)


def _linear(case: Linear, given: Inputs, config: Config) -> Tensor:
    from backends.triton_gpu.kernels.weight_only import linear  # noqa: PLC0415 (kernels are imported when they are launched)

    weight = (given[name] for name in ("planes", "scale", "zero", "bias"))
    return linear(given["x"], *weight, case.bits, case.group, case.offset, config=config)


def _int8(case: Linear, given: Inputs, config: Config) -> Tensor:
    from backends.triton_gpu.kernels.int8 import packed_linear_int8  # noqa: PLC0415

    names = ("x", "input_scale", "input_zero", "planes", "scale", "zero", "bias")
    return packed_linear_int8(*(given[name] for name in names), case.bits, case.group, case.offset, case.dtype, config=config)


def _linear_starts(problem: Problem, arch: int) -> list[Config]:
    shape = (problem.M, problem.N, problem.K)
    best: dict[Config, float] = {}
    for form in _forms(problem.format.bits, arch):
        splits = [replace(form.config, split=split) for split in select.SPLITS]
        times = {config: select.estimate(form, *shape, config) for config in splits}
        fastest = min(times, key=times.__getitem__)
        best[fastest] = times[fastest]
    return sorted(best, key=best.__getitem__)[:STARTS]


def _forms(bits: int, arch: int) -> list[select.Form]:
    """Of the width, or of the nearest that has any."""
    for near in sorted(layout.PLANES, key=lambda width: abs(width - bits)):
        if found := select.forms(arch, near):
            return found
    where, remedy = "backends/triton_gpu/configs.json", "python -m tools.kernel_counts --write"
    raise DataError(f"there are no forms for sm_{arch}", where=where, remedy=remedy)


def _int8_starts(problem: Problem, arch: int) -> list[Config]:
    from backends.triton_gpu.kernels import int8  # noqa: PLC0415

    first = int8.choose(problem.format.bits, problem.M, problem.N, problem.K, problem.case.group, arch)
    return [first, replace(first, tile_m=max(8, first.tile_m // 2))]


OF_BOTH = {"tile_n": (64, 128, 256), "spans": (1, 2, 4), "warps": (4, 8), "stages": (2, 3, 4, 5)}
TUNED = {
    each.name: each
    for each in (
        Tuned("packed_linear", _linear, _linear_starts, OF_BOTH | {"depth": (1, 2, 4)}),
        Tuned("packed_linear_int8", _int8, _int8_starts, OF_BOTH),
    )
}
