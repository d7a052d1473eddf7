"""What widths are chosen for: sites with what each may become, what that costs and takes; and a choice for all of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ir import edit, knapsack
from ir.knapsack import Choice, Option
from ir.schemes import change_bits, with_bits
from ir.sites import Layer, Mark
from ir.weights import stored_bits
from passes.base import Context
from passes.costs import Costs
from passes.latency import LatencyTable

Site = Sequence[Layer]  # linears that share a choice
Marks = tuple[Mark, ...]  # one for each layer of a site


def stored(site: Site, marks: Marks) -> int:
    """Bits that a site's weights take."""
    return sum(stored_bits(tuple(edit.value(layer.weight).shape), mark.weight) for layer, mark in zip(site, marks, strict=True))


def weights_in(site: Site) -> int:
    """Weights of a site."""
    return sum(int(edit.value(layer.weight).numel()) for layer in site)


def marked(layer: Layer, width: int | str, group: int | None) -> Mark:
    """The layer's encodings with another width of the weight, or with the widths of a scheme; and with another group of the weight."""
    given, weight = layer.mark
    given, weight = change_bits(layer, width) if isinstance(width, str) else Mark(given, with_bits(weight, width))
    return Mark(given, weight if group is None else replace(weight, block=(1, group)))


def refusal(ctx: Context, layer: Layer, mark: Mark) -> str | None:
    """Why the target cannot have a layer as `mark`; None if it can."""
    if ctx.backend is None:
        return None
    encodings = {name: encoding for name, encoding in mark._asdict().items() if encoding is not None}
    return ctx.backend.supports(layer.kind, encodings, tuple(edit.value(layer.weight).shape))


@dataclass(frozen=True)
class Problem:
    """Sites, and what each may become.

    Args:
        sites: in graph order.
        options: of each site.
        costs: predicted, by layer and mark.
        budget: bits of the weights; nanoseconds, if there are latencies.
        latencies: of the target.
    """

    sites: Sequence[Site]
    options: Sequence[Sequence[Marks]]
    costs: Costs
    budget: int
    latencies: LatencyTable | None = None

    def size(self, site: Site, marks: Marks) -> int:
        """What a site takes of the budget."""
        if self.latencies is None:
            return stored(site, marks)
        return round(1e6 * sum(self.latencies.of(layer, mark) for layer, mark in zip(site, marks, strict=True)))

    @property
    def weights(self) -> int:
        """Weights of all sites."""
        return sum(map(weights_in, self.sites))

    def cost(self, site: Site, marks: Marks) -> float:
        """The predicted cost of a site."""
        return sum(self.costs[layer.path, str(mark)] for layer, mark in zip(site, marks, strict=True))

    def table(self, factors: Sequence[float] = ()) -> list[list[Option]]:
        """The options of the knapsack, the costs of each site multiplied by its factor."""
        scaled = factors or [1.0] * len(self.sites)
        return [
            [Option(factor * self.cost(site, marks), self.size(site, marks)) for marks in own]
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
    def taken(self) -> list[Marks]:
        """The marks of every site."""
        return [own[pick] for own, pick in zip(self.problem.options, self.choice.picks, strict=True)]

    @property
    def costs(self) -> list[float]:
        """The predicted cost of every site."""
        return [self.problem.cost(site, marks) for site, marks in zip(self.problem.sites, self.taken, strict=True)]

    @property
    def cost(self) -> float:
        """Predicted."""
        return sum(self.costs)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return sum(map(stored, self.problem.sites, self.taken)) / self.problem.weights

    def marks(self, without: Collection[int] = ()) -> dict[Layer, Mark]:
        """The encodings by layer; some sites left out, by number."""
        sites = enumerate(zip(self.problem.sites, self.taken, strict=True))
        return {layer: mark for index, (site, marks) in sites if index not in without for layer, mark in zip(site, marks, strict=True)}
