"""`fit_budget`: decide in one search how many units of channels stay and what widths the rest gets, under one budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from ir.errors import OptionError
from ir.sites import check_patterns, layers
from passes.base import Context, Effect
from passes.budget.allocation import Allocation, Problem
from passes.budget.budgeted import Budgeted
from passes.budget.costs import Costs, raised
from passes.budget.forms import Cuts, Forms, Site
from passes.budget.linked import Linked, cuts_of, link
from passes.budget.trial import Trial
from passes.budget.tryout import promising, try_out
from passes.pipeline import Pipeline
from passes.pruning import keeping
from passes.pruning.dropping import drop, tell_left
from passes.pruning.kinds import KINDS
from passes.pruning.prunable import annotated_units
from passes.pruning.unit_scores import CRITERIA

RATES = (1.0, 2.0, 3.0, 4.0, 16.0, 256.0)  # of plans: the last drops only what the budget does not allow at any width


@dataclass(frozen=True)
class FitBudget(Budgeted):
    """Drop units of channels and give annotated linears their widths, with the least predicted loss of both that one budget allows.

    Before::

        %2 = aten.linear(%1, %up): [.., 704] {weight: u4[1,64]}; ... %9 = aten.linear(%8, %down): [.., 256] {weight: u4[1,64]}

    After::

        %2 = aten.linear(%1, %up): [.., 352] {weight: u2[1,64]}; ... %9 = aten.linear(%8, %down): [.., 256] {weight: u3[1,-1]}

    An option is what `assign_bits` chooses among, and a size. Its loss is that of `assign_bits`, with what dropping, refitting and
    rounding together leave of the weight: for linears that lose columns `ΔW = W − Ŵ'`, with `W'` refitted onto the columns that stay
    (as of `prune`) and then rounded; for those that lose rows the sum over rows that stay. A criterion of `prune` says in which order units
    go. Linears that units run through are one site of the knapsack; of their options those are kept that no other beats in cost and size.

    Dropping much is no small change: its loss is predicted too low, and unevenly. So several plans are made: with its part of the cost
    multiplied by rates, 1, 2, 3, 4, 16 and 256; and with one share of all units, for each share. All are measured on tokens held out (the
    KL of the model from itself) as rounded by `rounding`, and the one that measures least is taken. If `finish` names the passes that are
    to follow, those plans that no other beats, in weights kept and in what it measures, are tried out on a copy, after these passes: for
    learned rounding wins back more of what rounding costs than of what dropping does. Then what was chosen is dropped as by `prune`:
    refitted block after block, and cut.

    Limits: 1. those of `assign_bits` and `prune`; 2. which units stay is decided before widths are; 3. units stay whose linears are not all
    annotated, or would link so many sites that they could shrink in more than 64 ways; the report says which.

    Args:
        bits: budget: bits for each weight that there is before units are dropped, with scales and zero points.
        memory: budget in place of `bits`: bits over 16, the share that is left of the size in FP16.
        bytes, latency, latencies, widths, groups, fused, loss, rounding, tokens, file, corrections, seed: as of `assign_bits`.
        measure: tokens held out to measure plans on, as of `assign_bits`; 0 measures nothing and takes the predictions as they are.
        finish: pipeline text of what is to follow, `"learn_rounding(steps=25)"`, for trying choices out; "" for none.
        shares: of units to choose among that stay; of heads to the nearest whole one, and always at least one unit. One share alone is
            kept of all.
        what, multiple, criterion, ignore, damping: as of `prune`.

    Raises:
        OptionError: options that there are not, a budget that nothing fits into; the remedy names the nearest that works.
        CoverageError: the backend has no form for any of the options.
        DataError: no calibration data, or a file that does not fit.
    """

    measure: int = 4096
    finish: str = ""
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
        self.take_several("ignore")
        object.__setattr__(self, "shares", tuple(self.shares))
        if self.criterion not in CRITERIA:
            problem = f"there is no criterion {self.criterion!r}"
            raise OptionError(problem, where="fit_budget(criterion=...)", remedy=f"there are {list(CRITERIA)}")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            problem = f"shares that stay lie above 0 and up to 1, not {list(self.shares)}"
            raise OptionError(problem, where="fit_budget(shares=...)", remedy="give shares=(1.0, 0.5)")
        if self.finish and not self.measure:
            raise OptionError(
                "what is tried out is measured", where="fit_budget(finish=...)", remedy="give measure=4096, a number of tokens"
            )
        Pipeline.parse(self.finish)
        if self.multiple < 1 or self.damping < 0:
            raise OptionError("multiple is at least 1, damping at least 0", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data, to refit; folders for files."""
        if self.smaller:
            self.need_calibration(ctx)
        super().needs(ctx)

    @property
    def smaller(self) -> bool:
        """Whether anything may go."""
        return min(self.shares) < 1

    @property
    def narrowest(self) -> float:
        """None where units may go: how many can is the model's to say."""
        return 0.0 if self.smaller else super().narrowest

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """As `assign_bits`; inputs that are not rounded yet, and patterns that match."""
        if not ctx.part:
            check_patterns(self.ignore, layers(gm), "fit_budget(ignore=...)")
        rounded = next((layer.path for site in self.sites(gm) for layer in site if layer.input_rounded), None)
        if rounded is not None:
            raise OptionError("the input is rounded already", where=rounded, remedy="put fit_budget before quantize")
        super().requires(gm, ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Decide, drop, refit and annotate; returns the number of linears whose encoding or size changes."""
        linked = self.linked(gm, ctx, self.sites(gm), scored=True)
        return self._change(gm, ctx, linked, self.decide(gm, ctx, linked).taken)

    def _change(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked], taken: Sequence[Forms]) -> int:
        """Drop, refit and annotate as was decided."""
        forms = {layer: form for own, made in zip(linked, taken, strict=True) for layer, form in zip(own.layers, made, strict=True)}
        changed = sum(layer.mark != form.mark or form.shape is not None for layer, form in forms.items())
        picked = [pair for own, made in zip(linked, taken, strict=True) for pair in own.picked(own.way_of(made))]
        if picked:
            drop(gm, ctx, picked, compensate=True, damping=self.damping, bias=False)
        for layer, form in forms.items():
            layer.annotate(form.mark)
        return changed

    def finished(
        self, gm: GraphModule, trial: Trial, linked: Sequence[Linked], tried: Sequence[Allocation], measured: Sequence[float]
    ) -> dict[int, float]:
        """Of choices that are not ruled out, each once."""
        if not self.finish:
            return {}
        finish = Pipeline.parse(self.finish)

        def change(copy: GraphModule, ctx: Context, taken: tuple[Forms, ...]) -> None:
            own = self.linked(copy, ctx, self.sites(copy), scored=False)
            scored = [replace(twin, scores=one.scores) for twin, one in zip(own, linked, strict=True)]
            self._change(copy, ctx, scored, taken)

        chosen = promising([one.kept for one in tried], measured)
        return {index: try_out(gm, trial.ctx, trial.held, partial(change, taken=tuple(tried[index].taken)), finish) for index in chosen}

    def linked(self, gm: GraphModule, ctx: Context, sites: Sequence[Site], *, scored: bool) -> list[Linked]:
        """Sites that units run through, each with the counts that shares allow."""
        if not self.smaller:
            return super().linked(gm, ctx, sites, scored=scored)
        units, left = annotated_units(gm, self.what, self.ignore, {str(layer.weight.target) for site in sites for layer in site})
        counts = [keeping.at_shares(own, self.shares, self.multiple) for own in units]
        scores = [torch.zeros(own.size) for own in units]
        if scored:
            scores = CRITERIA[self.criterion].scores(gm, ctx, units, self.tokens, self.seed) if units else []
        found = link(sites, units, counts, scores)
        if scored:
            used = {id(own) for group in found for own in group.units}
            for own in units:
                if id(own) not in used:
                    left.setdefault("their units link too many sites", []).append(own.readers[0][0])
            tell_left(gm, ctx, left, by=self.name())
        return found

    def cuts(self, linked: Sequence[Linked]) -> Cuts:
        """What stays at each count."""
        return cuts_of(linked, self.damping)

    def plans(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked], predicted: Costs) -> dict[str, Problem]:
        """One for each rate, and one for each share alone that the budget has room for; if they are measured and anything may be chosen."""
        if not (self.measure and self.smaller and len(self.shares) > 1):
            return super().plans(gm, ctx, linked, predicted)
        found = {f"rate {rate:g}": self.problem(gm, ctx, linked, raised(predicted, rate)) for rate in RATES}
        for share in self.shares:
            alike = self.problem(gm, ctx, [self._at(own, share) for own in linked], predicted)
            if alike.least <= alike.budget:
                found[f"{share:.0%} of all units"] = alike
        return found

    def _at(self, own: Linked, share: float) -> Linked:
        """With one share of its units alone."""
        return replace(own, counts=tuple(keeping.at_shares(units, (share,), self.multiple) for units in own.units))

    def made(self) -> dict[str, Any]:
        """The options that predictions depend on."""
        return super().made() | ({"criterion": self.criterion, "damping": self.damping} if self.smaller else {})
