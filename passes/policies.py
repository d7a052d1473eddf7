"""The search for policies of smoothing, group of channels by group: what was tried, at what error, what was taken; as tables too."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ir.smoothing import Policy, product

BEST = 5  # of each of two lines, that are crossed


class Search(NamedTuple):
    """The policy that was taken for one group, and the squared error of each that was tried."""

    taken: Policy
    errors: Mapping[Policy, float]


def among(grid: Iterable[Policy], error: Callable[[Policy], float]) -> Search:
    """The best policy of a grid."""
    errors = {policy: error(policy) for policy in grid}
    return Search(min(errors, key=lambda policy: errors[policy]), errors)


def crossed(strengths: Iterable[Policy], statistics: Iterable[Policy], error: Callable[[Policy], float]) -> Search:
    """The best policy with one of the `BEST` best strengths of one line, and one of the `BEST` best statistics of another."""
    first, second = among(strengths, error).errors, among(statistics, error).errors
    alphas = [policy.alpha for policy in sorted(first, key=lambda policy: first[policy])[:BEST]]
    quantiles = [policy.q for policy in sorted(second, key=lambda policy: second[policy])[:BEST]]
    found = among(product(alphas, quantiles), error)
    return Search(found.taken, {**first, **second, **found.errors})


def tables(searches: Mapping[str, Search]) -> dict[str, list[dict[str, Any]]]:
    """`smoothing`: what each group took, by its first reader. `policies`: the error ‖Y − Ŷ‖ of every policy over that of the group's best.

    It is the mean over the groups that tried the policy.
    """
    counts = Counter(found.taken for found in searches.values())
    ratios: dict[Policy, list[float]] = {}
    for found in searches.values():
        least = min(found.errors.values())
        for policy, error in found.errors.items():
            ratios.setdefault(policy, []).append((error / least) ** 0.5 if least else 1.0)
    chosen = [{"layer": path, "alpha": found.taken.alpha, "quantile": found.taken.q} for path, found in searches.items()]
    tried: list[dict[str, Any]] = []
    for policy, own in ratios.items():
        row = {"alpha": policy.alpha, "quantile": policy.q, "groups": len(own), "taken": counts[policy]}
        tried.append(row | {"error over the best": round(sum(own) / len(own), 4)})
    return {"smoothing": chosen, "policies": tried}
