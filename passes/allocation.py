"""What widths are chosen for: sites with what each may become, what that costs and takes; and a choice for all of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ir import edit, knapsack
from ir.encoding import Encoding
from ir.knapsack import Choice, Option
from ir.sites import Layer
from ir.weights import stored_bits
from passes.costs import Costs

Site = Sequence[Layer]  # linears that share a choice
Marks = tuple[Encoding, ...]  # one for each layer of a site


def size(site: Site, marks: Marks) -> int:
    """Bits that a site takes."""
    return sum(stored_bits(tuple(edit.value(layer.weight).shape), mark) for layer, mark in zip(site, marks, strict=True))


def weights_in(site: Site) -> int:
    """Weights of a site."""
    return sum(int(edit.value(layer.weight).numel()) for layer in site)


@dataclass(frozen=True)
class Problem:
    """Sites, and what each may become.

    Args:
        sites: in graph order.
        options: of each site.
        costs: predicted, by layer and encoding.
        budget: bits.
    """

    sites: Sequence[Site]
    options: Sequence[Sequence[Marks]]
    costs: Costs
    budget: int

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
            [Option(factor * self.cost(site, marks), size(site, marks)) for marks in own]
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
        return self.choice.size / self.problem.weights

    def marks(self, without: Collection[int] = ()) -> dict[Layer, Encoding]:
        """The encodings by layer; some sites left out, by number."""
        sites = enumerate(zip(self.problem.sites, self.taken, strict=True))
        return {layer: mark for index, (site, marks) in sites if index not in without for layer, mark in zip(site, marks, strict=True)}
