"""The predicted loss over the budget: one choice for each of a row of budgets, from costs that are known."""

from collections.abc import Iterable
from typing import Any

from ir import knapsack
from ir.knapsack import Choice
from passes.budget.allocation import Allocation, Problem

POINTS = 20  # budgets, evenly spaced from the least size to the greatest that is of any use


def curve(problem: Problem, points: int = POINTS) -> list[Choice]:
    """Choices for growing budgets, each cheaper than the one before.

    Greedy ones: no more than one step of one site from the best possible, and found at once however many sites there are.
    """
    table = problem.table()
    least = sum(min(option.size for option in options) for options in table)
    greatest = knapsack.greedy(table, sum(max(option.size for option in options) for options in table)).size
    found: list[Choice] = []
    for point in range(points):
        choice = knapsack.greedy(table, least + (greatest - least) * point // max(points - 1, 1))
        if not found or choice.cost < found[-1].cost:
            found.append(choice)
    return found


def rows(problem: Problem, unit: str, chosen: Allocation, measured: Iterable[tuple[Allocation, float]]) -> list[dict[str, Any]]:
    """The table `budgets`, by bits a weight: what is predicted; what was measured, None where nothing was; and which one was chosen.

    Args:
        unit: of the loss, the name of its column.
        chosen: the allocation that was.
        measured: allocations and their divergences, nats a token.
    """
    marked: dict[tuple[int, ...], tuple[Allocation, float | None]] = {chosen.choice.picks: (chosen, None)}
    marked |= {allocation.choice.picks: (allocation, divergence) for allocation, divergence in measured}
    points: list[tuple[float, float, float | None, bool]]
    points = [(Allocation(problem, choice).bits, choice.cost, None, False) for choice in curve(problem) if choice.picks not in marked]
    points += [(one.bits, one.cost, divergence, picks == chosen.choice.picks) for picks, (one, divergence) in marked.items()]
    ordered = sorted(points, key=lambda point: point[:2])
    return [{"bits": bits, unit: cost, "measured": divergence, "chosen": taken} for bits, cost, divergence, taken in ordered]
