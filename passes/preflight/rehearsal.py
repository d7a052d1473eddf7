"""Run a part of a model through the whole pipeline and the backend, measure every step, and throw the result away."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ir import edit
from ir.memory import give_back
from passes.backend import Backend
from passes.base import Context, Pass
from passes.pipeline import Pipeline
from passes.preflight.part import part
from passes.preflight.resources import Memory, memory, size_of, watched
from passes.progress import Progress

STEPS = "steps"  # the option of passes that learn: how often they do what takes long


@dataclass(frozen=True)
class Cost:
    """What one step took: seconds, and bytes of memory at most, beside those there were before the first step."""

    seconds: float
    memory: Memory


@dataclass(frozen=True)
class Rehearsal:
    """What a run on a part took.

    Args:
        costs: of every pass; of the checks between them, of lowering and of writing.
        written: bytes of the result.
        scratch: bytes of temporary files, at most as seen between steps.
    """

    costs: tuple[Cost, ...]
    written: int
    scratch: int


@dataclass(frozen=True)
class Size:
    """How much of a model and its data a rehearsal takes: the layers by their places, batches, and steps of passes that learn."""

    places: tuple[int, ...]
    batches: int
    steps: int


@dataclass
class _Meter:
    """The costs of blocks of code, one by one."""

    before: Memory = field(default_factory=memory)
    costs: list[Cost] = field(default_factory=list)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        started = time.perf_counter()
        with watched() as peak:
            yield
        self.costs.append(Cost(time.perf_counter() - started, self.beyond(peak)))

    def beyond(self, peak: Memory) -> Memory:
        """What there is more than at the beginning."""
        return Memory(max(peak.resident - self.before.resident, 0), max(peak.own - self.before.own, 0))


def rehearse(gm: GraphModule, pipeline: Pipeline, ctx: Context, target: Backend, size: Size, folder: Path) -> Rehearsal:
    """Run a part of a captured graph through a pipeline and a backend.

    Tensors are shared with the graph, which is left as it was. No files are written but below `folder`, an existing one.

    Raises:
        FxpressError: as the compile itself.
    """
    give_back()
    small, convert = part(gm, size.places)
    batches = [convert(batch) for batch in ctx.calibration[: size.batches]]
    own = replace(
        ctx, calibration=batches, probe=convert(ctx.probe), progress=Progress(), skipped=[], notes=[], tables={}, statistics=None, part=True
    )
    own.original = edit.copied(small)
    meter = _Meter()
    with _temporary(folder) as scratch:
        steps = Pipeline(tuple(shortened(step, size.steps, scratch) for step in pipeline))
        started = time.perf_counter()
        records = steps.execute(small, own)
        checks = time.perf_counter() - started - sum(record.seconds for record in records)
        peaks = [Memory(record.peak_bytes, record.own_bytes) for record in records]
        costs = [Cost(record.seconds, meter.beyond(peak)) for record, peak in zip(records, peaks, strict=True)]
        used = size_of(scratch)
        with meter():
            executable = target.lower(small, small.meta["example"], [])
        used = max(used, size_of(scratch))
        result = scratch / "result"
        result.mkdir()
        with meter():
            executable.save(result)
        return Rehearsal((*costs, Cost(checks, Memory()), *meter.costs), size_of(result), used)


def learns(step: Pass) -> int:
    """How many steps a pass learns for; 0 if it does not."""
    return int(getattr(step, STEPS, 0))


def shortened(step: Pass, steps: int, folder: Path) -> Pass:
    """A pass that learns for a few steps only, and writes its files, if they are not there yet, into `folder`."""
    named = {option: Path(getattr(step, option)) for option in step.files if getattr(step, option)}
    changed: dict[str, Any] = {option: str(folder / path.name) for option, path in named.items() if not path.exists()}
    if learns(step) > steps:
        changed[STEPS] = steps
    return replace(step, **changed) if changed else step


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder below `folder` for all temporary files meanwhile."""
    scratch, usual = Path(tempfile.mkdtemp(dir=folder)), tempfile.tempdir
    tempfile.tempdir = str(scratch)
    try:
        yield scratch
    finally:
        tempfile.tempdir = usual
        shutil.rmtree(scratch, ignore_errors=True)
