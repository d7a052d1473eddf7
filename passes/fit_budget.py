"""`fit_budget`: decide in one search how many units of channels stay and what widths the rest gets, under one budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ir.errors import DataError, OptionError
from ir.sites import Layer, check_patterns, layers
from passes import keeping
from passes.allocation import Allocation
from passes.base import Context, Effect
from passes.budgeted import Budgeted
from passes.dropping import drop, tell_left
from passes.forms import Cuts, Site
from passes.linked import Linked, cuts_of, link
from passes.prunable import KINDS, Units, found_units
from passes.unit_scores import CRITERIA


@dataclass(frozen=True)
class FitBudget(Budgeted):
    """Drop units of channels and give annotated linears their widths, with the least predicted loss of both that a budget allows.
    """

    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    what: tuple[str, ...] = KINDS
    multiple: int = 32
    criterion: str = "fisher"
    ignore: tuple[str, ...] = ()
    damping: float = 0.01
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.take_names("what", KINDS)
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        object.__setattr__(self, "shares", tuple(self.shares))
        if self.criterion not in CRITERIA:
            problem = f"there is no criterion {self.criterion!r}"
            raise OptionError(problem, where="fit_budget(criterion=...)", remedy=f"there are {list(CRITERIA)}")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise OptionError(f"shares that stay lie above 0 and up to 1, not {list(self.shares)}", where="fit_budget(shares=...)")
        if self.multiple < 1 or self.damping < 0:
            raise OptionError("multiple is at least 1, damping at least 0", where=str(self))

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """As `assign_bits`; and patterns that match."""
        check_patterns(self.ignore, layers(gm), "fit_budget(ignore=...)")
        super().requires(gm, ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Decide, drop, refit and annotate; returns the number of linears whose encoding or size changes."""
        linked = self.linked(gm, ctx, self.sites(gm), scored=True)
        made = self.decide(gm, ctx, linked)
        forms = made.forms()
        changed = sum(layer.mark != form.mark or form.shape is not None for layer, form in forms.items())
        picked = [pair for own, taken in zip(linked, made.taken, strict=True) for pair in own.picked(own.way_of(taken))]
        drop(gm, ctx, picked, compensate=True, damping=self.damping, bias=False)
        for layer, form in forms.items():
            layer.annotate(form.mark)
        return changed

    def linked(self, gm: GraphModule, ctx: Context, sites: Sequence[Site], *, scored: bool) -> list[Linked]:
        units, left = found_units(gm, self.what, self.ignore)
        units = [own for own in units]
        counts = [keeping.at_shares(own, self.shares, self.multiple) for own in units]
        scores = [torch.zeros(own.size) for own in units]
        if scored:
            tell_left(gm, ctx, left, by=self.name())
            if any(count < own.size for own, of in zip(units, counts, strict=True) for count in of):
                scores = CRITERIA[self.criterion].scores(gm, ctx, units, self.tokens, self.seed)
        return link(sites, units, counts, scores)

    def cuts(self, linked: Sequence[Linked]) -> Cuts:
        return cuts_of(linked, self.damping)

    def made(self) -> dict[str, Any]:
        return super().made() | {"criterion": self.criterion, "damping": self.damping}
