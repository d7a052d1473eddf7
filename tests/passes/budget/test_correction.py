"""Corrections of a model that is a formula: costs and interactions are known."""

import pytest
from torch import fx, nn

from ir.knapsack import Choice
from ir.sites import Layer
from passes.budget import allocation
from passes.budget.allocation import Allocation, Problem
from passes.budget.correction import BOUNDS, Look, best, corrected, factors, interactions, look
from passes.budget.forms import Form

MARKS = [(Form.parse("u2[1,-1]"),), (Form.parse("u4[1,-1]"),)]
TRUE = {"a": 1.0, "b": 3.0, "c": 0.5}  # the cost of two bits
PREDICTED = {"a": 3.0, "b": 1.0, "c": 0.5}


class Formula:
    """A trial whose divergence is the sum of true costs, and 0.25 if a and b are both in two bits."""

    def divergences(self, variants):
        return [self.value({layer.path for layer, mark in marks.items() if mark.weight.bits == 2}) for marks in variants]

    @staticmethod
    def value(narrow):
        return sum(TRUE[path] for path in narrow) + 0.25 * ({"a", "b"} <= narrow)


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(allocation, "stored", lambda site, marks: marks[0].weight.bits)
    node = fx.symbolic_trace(nn.Identity()).graph.output_node()
    costs = {(path, str(marks[0])): cost * (marks[0].weight.bits == 2) for path, cost in PREDICTED.items() for marks in MARKS}
    return Problem([[Layer(node, path)] for path in TRUE], [MARKS] * 3, costs, 8)


def test_contributions_and_interactions_are_those_of_the_formula(problem):
    seen = look(Allocation(problem, Choice((0, 0, 0), 4.5, 6, 4.5)), Formula())
    assert seen.divergence == 4.75
    assert seen.marginals == [1.25, 3.25, 0.5]
    pairs = interactions(seen, Formula())
    assert next((pair.first, pair.second) for pair in pairs) == (0, 1)
    assert [pair.interaction for pair in pairs] == pytest.approx([0.25, 0, 0])
    assert len(interactions(seen, Formula(), count=2)) == 1 and interactions(seen, Formula(), count=1) == []


def test_a_correction_finds_what_prediction_misses(problem):
    looks = corrected(problem, Formula(), rounds=5)
    assert next(seen.allocation.choice.picks for seen in looks) == (1, 0, 0)  # a is widened, as predicted
    assert looks[0].divergence == 3.5
    assert best(looks).divergence == min(seen.divergence for seen in looks)
    assert len({seen.allocation.choice.picks for seen in looks}) == len(looks) < 6  # none twice, so it ends


def test_none_are_made_unless_asked_for(problem):
    assert len(corrected(problem, Formula(), rounds=0)) == 1


def test_factors_are_relative_and_bounded(problem):
    seen = Allocation(problem, Choice((0, 0, 0), 4.5, 6, 4.5))
    doubled = [2 * cost for cost in seen.costs]
    assert factors(Look(seen, 9.0, doubled)) == pytest.approx([1, 1, 1])
    low, high = BOUNDS
    assert factors(Look(seen, 9.0, [-1.0, 4.0, 1.0])) == pytest.approx([low**0.5, high**0.5, 1.5])
    assert factors(Look(seen, 0.0, [0.0, 0.0, 0.0])) == [1, 1, 1]
