"""`Linked`: sites that shrink together, since units of channels run through them, and what they may become together."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor
from torch.fx import Node

from ir import edit
from ir.knapsack import Option
from ir.selection import stays
from ir.sites import Layer
from passes.budget.forms import Cuts, Forms, Shape, Site
from passes.pruning import keeping
from passes.pruning.kinds import Units

LIMIT = 64  # ways in which linked sites may shrink
Way = tuple[int, ...]  # how many units of each group stay
Shapes = Mapping[Layer, Shape]  # of linears that lose rows or columns
Weigh = Callable[[Site, Forms], Option]
FormsOf = Callable[[Site, Shapes], Iterable[Forms]]


@dataclass(frozen=True, eq=False)
class Linked:
    """Sites that groups of units run through; or one site by itself.

    Args:
        sites: in graph order.
        units: the groups.
        counts: of each group, how many units may stay.
        scores: of each group, of its units: the greatest stay.
    """

    sites: tuple[Site, ...]
    units: tuple[Units, ...] = ()
    counts: tuple[Sequence[int], ...] = ()
    scores: tuple[Tensor, ...] = ()

    @property
    def layers(self) -> list[Layer]:
        """All linears, site by site."""
        return [layer for site in self.sites for layer in site]

    @property
    def ways(self) -> Iterator[Way]:
        """All that may stay."""
        return product(*self.counts)

    def picked(self, way: Way) -> list[tuple[Units, Tensor]]:
        """The units that stay."""
        return [(own, keeping.greatest(score, count)) for own, score, count in zip(self.units, self.scores, way, strict=True)]

    def kept(self, way: Way) -> dict[tuple[Layer, int], Tensor]:
        """Which rows (0) and columns (1) of linears stay, bool, where any go."""
        found: dict[tuple[Layer, int], Tensor] = {}
        layers: dict[str, list[Layer]] = {}
        for layer in self.layers:
            layers.setdefault(str(layer.weight.target), []).append(layer)
        for own, channels in self.picked(way):
            for member in own.group.members:
                keep = stays(own.group, channels, member.channels)
                for layer in layers.get(member.path, ()) if not keep.all() else ():
                    before = found.get((layer, member.axis))
                    found[layer, member.axis] = keep if before is None else before & keep
        return found

    def shapes(self, way: Way) -> dict[Layer, Shape]:
        """The shapes of what is left of linears that lose rows or columns."""
        kept = self.kept(way)
        found = {layer: list(edit.value(layer.weight).shape) for layer, _ in kept}
        for (layer, axis), keep in kept.items():
            found[layer][axis] = int(keep.sum())
        return {layer: (rows, columns) for layer, (rows, columns) in found.items()}

    def way_of(self, forms: Forms) -> Way:
        """The way that the forms of all layers stand for."""
        shapes = {layer: form.shape for layer, form in zip(self.layers, forms, strict=True) if form.shape}
        return next(way for way in self.ways if self.shapes(way) == shapes)


def link(sites: Sequence[Site], units: Sequence[Units], counts: Sequence[Sequence[int]], scores: Sequence[Tensor]) -> list[Linked]:
    """Sites joined where units run through them; units that would leave too many ways stay as they are."""
    homes: dict[int, list[int]] = {index: [index] for index in range(len(sites))}  # by the first site: what belongs together
    own_units: dict[int, list[int]] = {index: [] for index in homes}
    home_of = list(homes)
    at: dict[str, set[int]] = {}
    for index, site in enumerate(sites):
        for layer in site:
            at.setdefault(str(layer.weight.target), set()).add(index)
    for number, own in enumerate(units):
        through = {index for path in own.paths for index in at.get(path, ())}
        joined = sorted({home_of[index] for index in through})
        together = sorted([number, *(unit for home in joined for unit in own_units[home])])
        if joined and math.prod(len(counts[unit]) for unit in together) <= LIMIT:
            members = sorted(index for home in joined for index in homes.pop(home))
            for home in joined:
                own_units.pop(home)
            homes[members[0]], own_units[members[0]] = members, together
            for index in members:
                home_of[index] = members[0]
    return [_linked(sites, units, counts, scores, homes[home], own_units[home]) for home in sorted(homes)]


def _linked(
    sites: Sequence[Site],
    units: Sequence[Units],
    counts: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
    members: Sequence[int],
    own: Sequence[int],
) -> Linked:
    return Linked(
        tuple(sites[index] for index in members),
        tuple(units[unit] for unit in own),
        tuple(counts[unit] for unit in own),
        tuple(scores[unit] for unit in own),
    )


def cuts_of(linked: Sequence[Linked], damping: float) -> Cuts:
    """What stays of linears at every size that they may take; of two ways to one size the first."""
    found: dict[tuple[Node, int, int], Tensor] = {}
    for own in linked:
        for way in own.ways:
            for (layer, axis), keep in own.kept(way).items():
                found.setdefault((layer.node, axis, int(keep.sum())), keep)
    return Cuts(found, damping)


def options(own: Linked, forms_of: FormsOf, weigh: Weigh) -> list[Forms]:
    """What linked sites may become together; what another of their options beats in cost and size is left out."""
    if not own.units:
        return list(forms_of(own.sites[0], {}))
    found: list[tuple[Option, Forms]] = []
    for shapes in map(own.shapes, own.ways):
        best: list[tuple[Option, Forms]] = [(Option(0.0, 0), ())]
        for site in own.sites:
            weighed = [(weigh(site, forms), forms) for forms in forms_of(site, shapes)]
            best = _frontier((_sum(a, b), forms + more) for a, forms in best for b, more in weighed)
        found += best
    return [forms for _, forms in _frontier(found)]


def _sum(a: Option, b: Option) -> Option:
    return Option(a.cost + b.cost, a.size + b.size)


def _frontier(found: Iterable[tuple[Option, Forms]]) -> list[tuple[Option, Forms]]:
    """By size, each cheaper than all smaller ones; of equals the first."""
    kept: list[tuple[Option, Forms]] = []
    for item in sorted(found, key=lambda item: (item[0].size, item[0].cost)):
        if not kept or item[0].cost < kept[-1][0].cost:
            kept.append(item)
    return kept
