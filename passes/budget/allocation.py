"""What linears may become: sites with their options, what these cost and take; and a choice for all of them."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ir import edit, knapsack
from ir.knapsack import Choice, Option
from ir.schemes import change_bits, with_bits
from ir.sites import Layer, Mark
from ir.weights import stored_bits
from passes.base import Context
from passes.budget.costs import Costs
from passes.budget.forms import Form, Forms, Shape, Site
from passes.budget.latency import LatencyTable


def stored(site: Site, forms: Forms) -> int:
    """Bits that a site's weights take."""
    return sum(stored_bits(form.shape_of(layer), form.weight) for layer, form in zip(site, forms, strict=True))


def weights_in(site: Site) -> int:
    """Weights of a site, as it is."""
    return sum(int(edit.value(layer.weight).numel()) for layer in site)


def weights_left(site: Site, forms: Forms) -> int:
    """Weights of a site as it is to become."""
    return sum(math.prod(form.shape_of(layer)) for layer, form in zip(site, forms, strict=True))


def formed(layer: Layer, width: int | str, group: int | None, shape: Shape | None = None) -> Form:
    """The layer's encodings with another width of the weight, or with the widths of a scheme; and with another group of the weight."""
    given, weight = layer.mark
    given, weight = change_bits(layer, width) if isinstance(width, str) else Mark(given, with_bits(weight, width))
    return Form(given, weight if group is None else replace(weight, block=(1, group)), shape)


def refusal(ctx: Context, layer: Layer, form: Form) -> str | None:
    """Why the target cannot have a layer in a form; None if it can."""
    if ctx.backend is None:
        return None
    encodings = {name: encoding for name, encoding in form.mark._asdict().items() if encoding is not None}
    return ctx.backend.supports(layer.kind, encodings, form.shape_of(layer))


@dataclass(frozen=True)
class Problem:
    """Sites, and what each may become.

    Args:
        sites: in graph order.
        options: of each site.
        costs: predicted, by layer and form.
        budget: bits of the weights; nanoseconds, if there are latencies.
        latencies: of the target.
    """

    sites: Sequence[Site]
    options: Sequence[Sequence[Forms]]
    costs: Costs
    budget: int
    latencies: LatencyTable | None = None

    def size(self, site: Site, forms: Forms) -> int:
        """What a site takes of the budget."""
        if self.latencies is None:
            return stored(site, forms)
        return round(1e6 * sum(self.latencies.of(layer, form) for layer, form in zip(site, forms, strict=True)))

    @property
    def weights(self) -> int:
        """Weights of all sites, as they are."""
        return sum(map(weights_in, self.sites))

    @property
    def least(self) -> int:
        """The smallest size that there is."""
        return sum(min(self.size(site, forms) for forms in own) for site, own in zip(self.sites, self.options, strict=True))

    def cost(self, site: Site, forms: Forms) -> float:
        """The predicted cost of a site."""
        return sum(self.costs[layer.path, str(form)] for layer, form in zip(site, forms, strict=True))

    def option(self, site: Site, forms: Forms) -> Option:
        """A site's forms as an option of the knapsack."""
        return Option(self.cost(site, forms), self.size(site, forms))

    def table(self, factors: Sequence[float] = ()) -> list[list[Option]]:
        """The options of the knapsack, the costs of each site multiplied by its factor."""
        scaled = factors or [1.0] * len(self.sites)
        return [
            [Option(factor * self.cost(site, forms), self.size(site, forms)) for forms in own]
            for site, own, factor in zip(self.sites, self.options, scaled, strict=True)
        ]

    def solve(self, factors: Sequence[float] = ()) -> "Allocation":
        """The choice with the least predicted cost, of costs corrected by factors."""
        return Allocation(self, knapsack.solve(self.table(factors), self.budget))


@dataclass(frozen=True)
class Allocation:
    """A choice for every site of a problem; `choice` counts costs as they were corrected, the properties as they were predicted."""

    problem: Problem
    choice: Choice

    @property
    def taken(self) -> list[Forms]:
        """The forms of every site."""
        return [own[pick] for own, pick in zip(self.problem.options, self.choice.picks, strict=True)]

    @property
    def costs(self) -> list[float]:
        """The predicted cost of every site."""
        return [self.problem.cost(site, forms) for site, forms in zip(self.problem.sites, self.taken, strict=True)]

    @property
    def cost(self) -> float:
        """Predicted."""
        return sum(self.costs)

    @property
    def kept(self) -> float:
        """The share of the weights that stay."""
        return sum(map(weights_left, self.problem.sites, self.taken)) / self.problem.weights

    @property
    def bits(self) -> float:
        """Bits per weight that there was before units were dropped."""
        return sum(map(stored, self.problem.sites, self.taken)) / self.problem.weights

    def forms(self, without: Collection[int] = ()) -> dict[Layer, Form]:
        """The forms by layer; some sites left out, by number."""
        sites = enumerate(zip(self.problem.sites, self.taken, strict=True))
        return {layer: form for index, (site, forms) in sites if index not in without for layer, form in zip(site, forms, strict=True)}
