"""The multiple-choice knapsack: one option for every site, the least total cost within a budget, with a proof of how good it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ir.errors import DataError, OptionError


@dataclass(frozen=True)
class Option:
    """What a site may become: its cost, any unit, and its size, a whole number."""

    cost: float
    size: int


@dataclass(frozen=True)
class Choice:
    """One option for every site.

    Args:
        picks: the number of each site's option.
        cost, size: their sums.
        bound: no choice within the budget costs less; equal to `cost`, up to rounding, where the search was finished.
    """

    picks: tuple[int, ...]
    cost: float
    size: int
    bound: float


def solve(sites: Sequence[Sequence[Option]], budget: int, *, seconds: float = 30.0) -> Choice:
    """The cheapest choice of at most `budget` in size: exact by HiGHS, or the best of HiGHS and a greedy climb if time runs out.

    Args:
        sites: the options of every site, at least one each.
        budget: upper limit of the sum of sizes.
        seconds: after which the best choice found so far is taken; its `bound` then says how far from the best it can be.

    Raises:
        OptionError: nothing fits; names the least size there is.
        DataError: a cost that is not finite.
    """
    if not all(np.isfinite(option.cost) for options in sites for option in options):
        raise DataError("a cost is not finite", remedy="look at the calibration data and the weights")
    least = sum(min(option.size for option in options) for options in sites)
    if least > budget:
        raise OptionError(f"nothing fits into {budget}: the smallest choice takes {least}", remedy=f"a budget of {least} or more")
    climbed = greedy(sites, budget)
    cost = np.array([option.cost for options in sites for option in options])
    size = np.array([option.size for options in sites for option in options], float)
    scale = max(float(np.abs(cost).max(initial=0.0)), 1e-300)
    of = np.repeat(np.arange(len(sites)), [len(options) for options in sites])
    one_each = csr_array((np.ones(len(of)), (of, np.arange(len(of)))), shape=(len(sites), len(of)))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint((size / budget)[None], -np.inf, 1)]
    found = milp(
        cost / scale,
        integrality=np.ones(len(of), np.int64),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"time_limit": seconds, "mip_rel_gap": 0},
    )
    bound = climbed.bound if found.mip_dual_bound is None else max(climbed.bound, float(found.mip_dual_bound) * scale)
    if found.x is None:
        return Choice(climbed.picks, climbed.cost, climbed.size, bound)
    starts = np.searchsorted(of, np.arange(len(sites)))
    picks = [int(np.argmax(part)) for part in np.split(found.x, starts[1:])]
    exact = _chosen(sites, picks, bound)
    best = exact if exact.size <= budget and exact.cost <= climbed.cost else climbed
    return Choice(best.picks, best.cost, best.size, min(bound, best.cost))


def greedy(sites: Sequence[Sequence[Option]], budget: int) -> Choice:
    """Start with the smallest options; while there is room, take the step along a site's convex hull that saves most per size.

    `bound` is the cost that fractions of the next step would reach: the linear relaxation's.
    """
    hulls = [_hull(options) for options in sites]
    at = [0] * len(sites)
    steps = sorted(
        (
            (_slope(options, hull, rank), site, rank)
            for site, (options, hull) in enumerate(zip(sites, hulls, strict=True))
            for rank in range(1, len(hull))
        ),
    )
    room = budget - sum(options[hull[0]].size for options, hull in zip(sites, hulls, strict=True))
    cost = bound = sum(options[hull[0]].cost for options, hull in zip(sites, hulls, strict=True))
    full = False
    for slope, site, rank in steps:  # steepest first; along a hull, slopes fall off, so a site's steps come in order
        before, after = (sites[site][hulls[site][r]] for r in (rank - 1, rank))
        fits = after.size - before.size <= room
        if not full:
            bound = cost + slope * min(room, after.size - before.size)
            full = not fits
        if fits and at[site] == rank - 1:
            at[site], room, cost = rank, room - (after.size - before.size), cost + after.cost - before.cost
    return _chosen(sites, [hull[rank] for hull, rank in zip(hulls, at, strict=True)], bound)


def _chosen(sites: Sequence[Sequence[Option]], picks: Sequence[int], bound: float) -> Choice:
    taken = [options[pick] for options, pick in zip(sites, picks, strict=True)]
    cost = sum(option.cost for option in taken)
    return Choice(tuple(picks), cost, sum(option.size for option in taken), min(bound, cost))


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull of cost over size, by size, from the smallest to the cheapest."""
    order = sorted(range(len(options)), key=lambda index: (options[index].size, options[index].cost))
    hull: list[int] = []
    for index in order:
        if hull and options[index].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _slope(options, [*hull[-2:]], 1) >= _slope(options, [hull[-1], index], 1):
            hull.pop()
        hull.append(index)
    return hull


def _slope(options: Sequence[Option], hull: Sequence[int], rank: int) -> float:
    before, after = options[hull[rank - 1]], options[hull[rank]]
    return (after.cost - before.cost) / max(after.size - before.size, 1)
