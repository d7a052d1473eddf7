"""What a search under a budget found, as tables and notes of the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from passes.base import Context
from passes.budget import budgets
from passes.budget.allocation import Allocation, weights_in, weights_left
from passes.budget.correction import Look, Pair, best
from passes.budget.forms import Site
from passes.units import NATS


def tell(ctx: Context, made: Allocation, unit: str, by: str) -> None:
    """The choice, in tables `widths` (a row for each linear) and `budgets`, and in notes of the pass that is named."""
    elements = Counter[str]()
    rows = []
    fewer = any(form.shape for form in made.forms().values())
    for layer, form in made.forms().items():
        weights = weights_left([layer], (form,))
        elements[str(form.mark)] += weights
        kept = {"kept": weights / weights_in([layer])} if fewer else {}
        cost = made.problem.costs[layer.path, str(form)]
        rows.append({"layer": layer.path, "encoding": str(form.mark), "weights": weights, **kept, unit: cost})
    total = sum(elements.values())
    time = f"{made.choice.size / 1e6:.4g} ms a token, " if made.problem.latencies else ""
    left = f"{total / made.problem.weights:.1%} of the weights kept, " if total < made.problem.weights else ""
    spent = f"{time}{left}{made.bits:.3f} bits a weight, {made.cost:.4g} {unit} predicted"
    bound = f", no choice below {made.choice.bound:.4g}" if made.choice.bound <= made.cost else ""
    ctx.notes.append(f"{by}: {spent}{bound}")
    ctx.notes.append(f"{by}: " + ", ".join(f"{mark} {count / total:.1%}" for mark, count in sorted(elements.items())))
    ctx.tables["widths"] = rows
    ctx.tables["contributions"] = contributions(made, unit, ())
    ctx.tables["budgets"] = budgets.rows(made.problem, unit, made, ())


def tell_measures(ctx: Context, looks: Sequence[Look], pairs: Sequence[Pair], unit: str, by: str) -> None:
    """What was measured, in tables `choices`, `contributions`, `interactions` and `budgets`, after `tell`."""
    taken, first = best(looks), looks[0]
    names = [name(site) for site in taken.allocation.problem.sites]
    picks = first.allocation.choice.picks
    ctx.tables["choices"] = [
        {
            "corrections": index,
            "bits": seen.allocation.bits,
            f"predicted, {unit}": seen.allocation.cost,
            f"measured, {NATS}": seen.divergence,
            "sites changed": sum(a != b for a, b in zip(seen.allocation.choice.picks, picks, strict=True)),
            "taken": "yes" if seen is taken else "",
        }
        for index, seen in enumerate(looks)
    ]
    ctx.tables["contributions"] = contributions(taken.allocation, unit, taken.marginals)
    ctx.tables["interactions"] = [{"first": names[p.first], "second": names[p.second], NATS: p.interaction} for p in pairs]
    ctx.tables["budgets"] = budgets.rows(
        taken.allocation.problem, unit, taken.allocation, [(seen.allocation, seen.divergence) for seen in looks]
    )
    ctx.notes.append(f"{by}: KL on held-out tokens {first.divergence:.4g} nats a token, {first.allocation.cost:.4g} {unit} predicted")
    if taken is not first:
        ctx.notes.append(f"{by}: corrected, KL {taken.divergence:.4g}, {taken.allocation.cost:.4g} {unit} predicted")
    elif len(looks) > 1:
        ctx.notes.append(f"{by}: no corrected choice measured less")


def tell_plans(
    ctx: Context, made: Mapping[str, Allocation], measured: Sequence[float], finished: Mapping[int, float], least: int, unit: str
) -> None:
    """The plans, in the table `plans`: how much each keeps, what it was measured at, and what behind the passes that follow, if it was."""
    ctx.tables["plans"] = [
        {
            "plan": plan,
            "weights kept": one.kept,
            "bits": one.bits,
            f"predicted by the plan, {unit}": one.cost,
            f"measured, {NATS}": divergence,
            **({f"finished, {NATS}": finished.get(index, "")} if finished else {}),
            "taken": "yes" if index == least else "",
        }
        for index, ((plan, one), divergence) in enumerate(zip(made.items(), measured, strict=True))
    ]


def contributions(made: Allocation, unit: str, marginals: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each site: its share of the budget and of the loss, predicted, and measured if it was."""
    rows: list[dict[str, Any]] = []
    for index, (site, forms, cost) in enumerate(zip(made.problem.sites, made.taken, made.costs, strict=True)):
        encodings = ", ".join(dict.fromkeys(map(str, forms)))
        rows.append({"site": name(site), "encoding": encodings, "weights": weights_left(site, forms), f"predicted, {unit}": cost})
        if marginals:
            rows[-1][f"measured, {NATS}"] = marginals[index]
    return rows


def name(site: Site) -> str:
    """The paths of a site's linears, their shared parent said once."""
    paths = [layer.path for layer in site]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1 or parents == {""}:
        return ", ".join(paths)
    parent = parents.pop()
    return f"{parent}." + ", ".join(path.removeprefix(f"{parent}.") for path in paths)
