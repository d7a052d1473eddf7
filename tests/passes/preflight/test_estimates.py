from dataclasses import dataclass
from typing import ClassVar

import pytest

import passes
from passes.base import Effect, Record
from passes.preflight.estimates import Axis, Estimate, estimate
from passes.preflight.rehearsal import Cost, Rehearsal, learns, shortened
from passes.preflight.resources import Memory

NAMES = ("evaluates", "rounds", "writes", "learns")


def taken(layers: int, batches: int, steps: int) -> Rehearsal:
    """Seconds and bytes of four steps by a law that is known."""
    seconds = (0.5 * layers * batches, 3.0 * layers, 2.0, layers * (batches + 0.25 * steps))
    sizes = (100 * batches + 7, 20 * layers, 50, 10 * layers + 30 * batches)
    costs = tuple(Cost(time, Memory(size, size // 2)) for time, size in zip(seconds, sizes, strict=True))
    return Rehearsal(costs, 1000 + 10 * layers, 0)


def test_estimates_follow_from_differences():
    layers, batches = Axis(taken(2, 2, 2), 1, 1, 31), Axis(taken(1, 4, 2), 2, 2, 14)
    made = estimate(NAMES, taken(1, 2, 2), layers, batches, Axis(taken(1, 2, 4), 2, 2), [0, 0, 0, 100])
    whole = taken(32, 16, 100)
    for step, cost in zip(made, whole.costs, strict=True):
        assert step.seconds == pytest.approx(cost.seconds), step.name
        assert step.memory.resident == cost.memory.resident
    assert [step.fixed for step in made] == [0.0, 0.0, 2.0, 0.0]
    assert made[1].layer == 3.0 and made[1].batch == 0.0
    assert made[0].layer == 8.0 and made[0].batch == 16.0
    assert (made[3].layers, made[3].samples) == (310, 420)


def test_what_shrinks_by_chance_is_taken_as_constant():
    first = Rehearsal((Cost(1.0, Memory(100, 100)),), 0, 0)
    less = Rehearsal((Cost(0.9, Memory(90, 90)),), 0, 0)
    (step,) = estimate(["x"], first, Axis(less, 1, 1, 79), Axis(less, 2, 2, 14), None, [0])
    assert step.seconds == 1.0 and step.memory.resident == 100


def test_what_was_measured_stands_beside():
    axes = Axis(taken(2, 2, 2), 1, 1, 3), Axis(taken(1, 4, 2), 2, 2, 2)
    found = Estimate(tuple(estimate(NAMES, taken(1, 2, 2), *axes, None, [0] * 4)), 10, 10, Memory(10**9, 10**8), 4, 1, 1.0)
    trace = [Record("evaluates", Effect.OBSERVE, 1, 9.0, None, (), 2 * 10**9), Record("rounds", Effect.CHANGE, 1, 8.0, None)]
    rows = found.compared(trace, 7.0, 6.0, Memory(3 * 10**9))
    assert [row["seconds"] for row in rows] == [9.0, 8.0, 7.0, 6.0]
    assert rows[0]["peak MB"] == 2000 and rows[0]["peak MB estimated"] == pytest.approx(1000.0004, abs=1e-3)
    assert found.peak.resident > 10**9
    assert found.total == sum(step.seconds for step in found.steps)


@dataclass(frozen=True)
class Learned(passes.Pass):
    steps: int = 500
    file: str = ""
    effect: ClassVar[Effect] = Effect.OBSERVE
    files: ClassVar[tuple[str, ...]] = ("file",)


def test_a_pass_on_trial_learns_shortly_and_writes_elsewhere(tmp_path):
    made = shortened(Learned(file="costs.json"), 4, tmp_path)
    assert made == Learned(4, str(tmp_path / "costs.json"))
    (tmp_path / "known.json").write_text("{}")
    known = Learned(3, str(tmp_path / "known.json"))
    assert shortened(known, 4, tmp_path) is known
    assert learns(known) == 3 and learns(passes.presets.W4A16.passes[0]) == 0
