"""What a compile will take, step by step, from rehearsals on parts of the model; and how right that was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from passes.base import Record
from passes.preflight.rehearsal import Cost, Rehearsal
from passes.preflight.resources import Memory

TABLE = "estimates"  # its title in the report
COLUMNS = ("step", "seconds", "a layer", "a batch", "fixed", "memory, MB", "by layers", "by samples")
CHECKS, WRITE = "checks between passes", "write"


@dataclass(frozen=True)
class Axis:
    """A second rehearsal, larger than the first along one axis: layers, batches, or steps of passes that learn.

    Args:
        run: what it took.
        first: units that the first rehearsal has.
        step: units that the second has more.
        more: units that the whole has more than the first; layers of other sizes count as so many of the typical one.
    """

    run: Rehearsal
    first: float
    step: float
    more: float = 0.0

    def growth(self, first: float, second: float) -> float:
        """What one more unit brings, if the two rehearsals took so much; nothing shrinks."""
        return max(second - first, 0.0) / self.step


@dataclass(frozen=True)
class Step:
    """What one step is estimated to take.

    Args:
        name: the pass's text.
        seconds: of the whole.
        layer, batch: seconds that one more brings.
        fixed: seconds that depend on neither.
        memory: bytes at most, beside those there were before.
        layers, samples: bytes of it that grow with the model's depth, and with the calibration data.
    """

    name: str
    seconds: float
    layer: float
    batch: float
    fixed: float
    memory: Memory
    layers: int
    samples: int


@dataclass(frozen=True)
class Estimate:
    """What a compile will take.

    Args:
        steps: the passes, the checks between them, lowering and writing.
        written: bytes of the result.
        scratch: bytes of temporary files.
        before: what the process had in memory before the first pass.
        layers, rehearsed: of the model, and of its part that was run at first.
        seconds: that the rehearsals took.
    """

    steps: tuple[Step, ...]
    written: int
    scratch: int
    before: Memory
    layers: int
    rehearsed: int
    seconds: float

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def peak(self) -> Memory:
        """Bytes in memory at most."""
        most = Memory()
        for step in self.steps:
            most.raise_to(step.memory)
        return Memory(self.before.resident + most.resident, self.before.own + most.own)

    def compared(self, trace: Sequence[Record], seconds: float, lowering: float, peak: Memory) -> list[dict[str, Any]]:
        """A row for each step, with what was measured beside what was estimated.

        Args:
            trace: what the passes took.
            seconds: of the checks between them.
            lowering, peak: seconds and bytes that lowering took.
        """
        times = [*(record.seconds for record in trace), seconds, lowering]
        peaks = [*(record.peak_bytes for record in trace), 0, peak.resident]
        rows = []
        for step, time, most in zip(self.steps, times, peaks, strict=False):  # what is written is not yet
            row = {"step": step.name, "seconds estimated": step.seconds, "seconds": time}
            most_estimated = self.before.resident + step.memory.resident
            rows.append(row | {"peak MB estimated": most_estimated / 1e6 if most else 0.0, "peak MB": most / 1e6})
        return rows

    def page(self) -> Table:
        """What the command line prints before the work starts."""
        head = f"pre-flight: {self.rehearsed} of {self.layers} layers went through in {self.seconds:.0f} s"
        table = Table(*COLUMNS, title=head, title_justify="left")
        for s in self.steps:
            times = (f"{time:.2f}" for time in (s.seconds, s.layer, s.batch, s.fixed))
            table.add_row(s.name, *times, *(f"{size / 1e6:.0f}" for size in (s.memory.resident, s.layers, s.samples)))
        peak = self.peak
        table.add_section()
        table.add_row("in all", f"{self.total:.2f}", "", "", "", f"{peak.resident / 1e6:.0f}", "", "")
        table.caption = (
            f"memory in all: {self.before.resident / 1e6:.0f} MB there are now, and the greatest of the steps; "
            f"{(peak.resident - peak.own) / 1e6:.0f} MB of it mapped files. "
            f"On disk: result {self.written / 1e6:.1f} MB, temporary files {self.scratch / 1e6:.1f} MB."
        )
        table.caption_justify = "left"
        return table


def estimate(names: Sequence[str], first: Rehearsal, layers: Axis, batches: Axis, steps: Axis | None, counts: Sequence[int]) -> list[Step]:
    """What every step takes of the whole: seconds grow with the depth in the same ratio whatever the samples are, bytes add up.

    Args:
        names: of the steps.
        first: the smallest rehearsal.
        layers, batches, steps: larger ones; the last is None where no pass learns.
        counts: steps that each pass learns for.
    """
    made = []
    for index, (name, cost) in enumerate(zip(names, first.costs, strict=True)):
        base = max(cost.seconds, 1e-9)
        left = max(counts[index] - steps.first, 0.0) if steps and index < len(counts) else 0.0
        a_layer, a_batch, a_step = (
            axis.growth(cost.seconds, axis.run.costs[index].seconds) if axis else 0.0 for axis in (layers, batches, steps)
        )
        deeper = 1 + a_layer * layers.more / base
        shallow = cost.seconds + a_batch * batches.more + a_step * left
        fixed = cost.seconds * max(1 - a_layer * layers.first / base, 0.0) * max(1 - a_batch * batches.first / base, 0.0)
        by_layers, by_batches = (_more(cost, axis, index) for axis in (layers, batches))
        resident = cost.memory.resident + by_layers.resident + by_batches.resident
        memory = Memory(resident, cost.memory.own + by_layers.own + by_batches.own)
        a_layer, a_batch = shallow * a_layer / base, deeper * a_batch
        made.append(Step(name, shallow * deeper, a_layer, a_batch, fixed, memory, by_layers.resident, by_batches.resident))
    return made


def _more(first: Cost, axis: Axis, index: int) -> Memory:
    """What the whole takes more than the first rehearsal in a step, by what the second took more."""
    before, after = first.memory, axis.run.costs[index].memory
    pairs = ((before.resident, after.resident), (before.own, after.own))
    return Memory(*(round(axis.growth(*pair) * axis.more) for pair in pairs))
