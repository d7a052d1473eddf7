import itertools

import pytest

from ir import knapsack
from ir.sites import layers
from passes.budget.allocation import Problem
from passes.budget.budgets import POINTS, curve, rows
from passes.budget.forms import Form
from tests.families import load

MARKS = [Form.parse(f"u{bits}[1,-1]") for bits in (2, 3, 4, 8)]


@pytest.fixture(scope="module")
def problem():
    sites = [[layer] for layer in layers(load("llama").graph()) if layer.path.endswith("_proj")]
    costs = {(site[0].path, str(mark)): (1 + index % 5) * 4.0**-mark.weight.bits for index, site in enumerate(sites) for mark in MARKS}
    return Problem(sites, [[(mark,) for mark in MARKS]] * len(sites), costs, 10**9)


def test_the_curve_falls_from_the_least_budget_to_the_greatest(problem):
    found = curve(problem)
    table = problem.table()
    assert POINTS // 2 < len(found) <= POINTS
    assert found[0].size == sum(min(option.size for option in options) for options in table)
    assert found[-1].cost == sum(min(option.cost for option in options) for options in table)
    for before, after in itertools.pairwise(found):
        assert after.cost < before.cost and after.size > before.size


def test_the_curve_is_near_the_best_choices(problem):
    for choice in curve(problem, points=6):
        assert choice.cost <= 1.2 * knapsack.solve(problem.table(), choice.size).cost


def test_what_was_chosen_and_measured_is_marked(problem):
    made = problem.solve()
    other = Problem(problem.sites, problem.options, problem.costs, curve(problem)[5].size).solve()
    found = rows(problem, "nats a token", made, [(other, 0.5)])
    assert [row["bits"] for row in found] == sorted(row["bits"] for row in found)
    (chosen,) = [row for row in found if row["chosen"]]
    (measured,) = [row for row in found if row["measured"] is not None]
    assert chosen["nats a token"] == made.cost and measured["measured"] == 0.5
    assert measured["nats a token"] == other.cost
