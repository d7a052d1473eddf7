"""Correct an allocation by measurement: what each site really adds, and which sites do worse, or better, together than alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from passes.budget.allocation import Allocation, Problem
from passes.budget.trial import Trial

PAIRED = 6  # sites with the greatest contributions, of which all pairs are measured
BOUNDS = (0.25, 4.0)  # of measured over predicted, relative to all sites: single measurements are noisy
DAMPING = 0.5  # the power of that ratio: halfway corrected choices measured less than wholly corrected ones in five of six comparisons


@dataclass(frozen=True)
class Look:
    """An allocation and its measures, nats a token.

    Args:
        allocation: what was measured.
        divergence: `K(all)`, the KL of the model from itself with every site rounded.
        marginals: `K(all) − K(all∖i)` for each site: what it adds to the others; none of an allocation that is not taken.
    """

    allocation: Allocation
    divergence: float
    marginals: Sequence[float]


@dataclass(frozen=True)
class Pair:
    """Two sites by number, and `K(all) − K(all∖i) − K(all∖j) + K(all∖{i,j})`: what they cost together beyond what each adds alone."""

    first: int
    second: int
    interaction: float


def corrected(problem: Problem, trial: Trial, rounds: int) -> list[Look]:
    """Solve, measure, correct the predictions, solve again; all that was measured, in order. `best` picks one.

    The search ends with an allocation that measures no less, or was measured before: the next round would find it again.
    """
    looks = [look(problem.solve(), trial)]
    for _ in range(rounds):
        found = problem.solve(factors(best(looks)))
        if any(found.choice.picks == seen.allocation.choice.picks for seen in looks):
            break
        (divergence,) = trial.divergences([found.forms()])
        if divergence >= best(looks).divergence:
            looks.append(Look(found, divergence, ()))
            break
        looks.append(look(found, trial))
    return looks


def best(looks: Sequence[Look]) -> Look:
    """The allocation that measured least; the first of equals."""
    return min(looks, key=lambda seen: seen.divergence)


def look(allocation: Allocation, trial: Trial) -> Look:
    """Measure an allocation, and without each of its sites in turn."""
    sites = range(len(allocation.problem.sites))
    whole, *without = trial.divergences([allocation.forms(), *(allocation.forms([site]) for site in sites)])
    return Look(allocation, whole, [whole - rest for rest in without])


def factors(seen: Look) -> list[float]:
    """What to multiply the predicted costs of each site by: the root of measured over predicted, relative to all sites together.

    A common factor changes no choice, so it is left out; what remains is kept within `BOUNDS`.
    """
    predicted = seen.allocation.costs
    common = sum(seen.marginals) / max(sum(predicted), 1e-30)
    if not common > 0:
        return [1.0] * len(predicted)
    low, high = BOUNDS
    ratios = (marginal / max(cost, 1e-30) for marginal, cost in zip(seen.marginals, predicted, strict=True))
    return [min(max(ratio / common, low), high) ** DAMPING for ratio in ratios]


def interactions(seen: Look, trial: Trial, count: int = PAIRED) -> list[Pair]:
    """All pairs of the `count` sites that add most, by falling strength."""
    greatest = sorted(range(len(seen.marginals)), key=lambda site: -seen.marginals[site])[:count]
    pairs = list(combinations(sorted(greatest), 2))
    if not pairs:
        return []
    whole, *without = trial.divergences([seen.allocation.forms(), *(seen.allocation.forms(pair) for pair in pairs)])
    found = [Pair(i, j, rest - whole + seen.marginals[i] + seen.marginals[j]) for (i, j), rest in zip(pairs, without, strict=True)]
    return sorted(found, key=lambda pair: -abs(pair.interaction))
