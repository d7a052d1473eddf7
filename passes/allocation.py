"""What widths are chosen for: sites with what each may become, what that costs and takes; and a choice for all of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ir import edit, knapsack
from ir.encoding import Encoding
from ir.knapsack import Choice, Option
from ir.schemes import with_bits
from ir.sites import Layer
from ir.weights import stored_bits
from passes.base import Context
from passes.costs import Costs
from passes.latency import LatencyTable

Site = Sequence[Layer]  # linears that share a choice
Marks = tuple[Encoding, ...]  # one for each layer of a site


def stored(site: Site, marks: Marks) -> int:
    """Bits that a site takes."""
    return sum(stored_bits(tuple(edit.value(layer.weight).shape), mark) for layer, mark in zip(site, marks, strict=True))


def weights_in(site: Site) -> int:
    """Weights of a site."""
    return sum(int(edit.value(layer.weight).numel()) for layer in site)


def marked(layer: Layer, width: int, group: int | None) -> Encoding:
    """The layer's encoding with another width, and another group."""
    encoding = layer.site("weight").encoding
    assert encoding is not None
    return replace(with_bits(encoding, width), block=encoding.block if group is None else (1, group))


def refusal(ctx: Context, layer: Layer, mark: Encoding) -> str | None:
    """Why the target cannot have a layer's weight as `mark`; None if it can."""
    if ctx.backend is None:
        return None
    given = layer.site("input").encoding
    marks = {"weight": mark} if given is None else {"input": given, "weight": mark}
    return ctx.backend.supports(layer.kind, marks, tuple(edit.value(layer.weight).shape))


@dataclass(frozen=True)
class Problem:
    """Sites, and what each may become.

    Args:
        sites: in graph order.
        options: of each site.
        costs: predicted, by layer and encoding.
        budget: bits; nanoseconds, if there are latencies.
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

    def marks(self, without: Collection[int] = ()) -> dict[Layer, Encoding]:
        """The encodings by layer; some sites left out, by number."""
        sites = enumerate(zip(self.problem.sites, self.taken, strict=True))
        return {layer: mark for index, (site, marks) in sites if index not in without for layer, mark in zip(site, marks, strict=True)}
