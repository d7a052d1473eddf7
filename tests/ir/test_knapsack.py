import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import DataError, OptionError
from ir.knapsack import Option, greedy, solve

OPTIONS = st.lists(st.builds(Option, st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=4)


def best(sites, budget):
    """By looking at all choices."""
    all_choices = itertools.product(*sites)
    return min(sum(o.cost for o in picked) for picked in all_choices if sum(o.size for o in picked) <= budget)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_no_choice_within_the_budget_is_cheaper(sites, slack):
    budget = sum(min(option.size for option in options) for options in sites) + slack
    choice = solve(sites, budget)
    taken = [options[pick] for options, pick in zip(sites, choice.picks, strict=True)]
    assert sum(option.size for option in taken) == choice.size <= budget
    assert sum(option.cost for option in taken) == pytest.approx(choice.cost)
    assert choice.cost == pytest.approx(best(sites, budget), abs=1e-6)
    assert choice.bound == pytest.approx(choice.cost, abs=1e-6)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_a_greedy_climb_fits_and_knows_a_bound(sites, slack):
    budget = sum(min(option.size for option in options) for options in sites) + slack
    choice = greedy(sites, budget)
    assert choice.size <= budget
    assert choice.bound - 1e-9 <= best(sites, budget) <= choice.cost + 1e-9


def test_without_time_the_greedy_choice_is_taken():
    sites = [[Option(16.0**-bits * (site + 1), bits * 1000 + site) for bits in (2, 3, 4, 8)] for site in range(400)]
    choice = solve(sites, 1_300_000, seconds=0.0)
    assert choice.size <= 1_300_000
    assert choice.cost <= 1.05 * choice.bound


def test_a_budget_that_nothing_fits_into_names_the_least_that_works():
    with pytest.raises(OptionError, match="takes 7") as error:
        solve([[Option(1, 3), Option(0, 9)], [Option(2, 4)]], 6)
    assert "7" in error.value.remedy
    with pytest.raises(DataError):
        solve([[Option(float("nan"), 1)]], 6)
