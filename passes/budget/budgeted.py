"""`Budgeted`: what passes share that choose forms of linears under one budget."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import CoverageError, DataError, OptionError
from ir.rounding import GPTQ, Nearest, Rounding
from ir.schemes import FLOAT, bits_of
from ir.sites import Layer
from ir.weights import unrounded
from passes.base import Context, Pass
from passes.budget import correction, costs, findings
from passes.budget.allocation import Allocation, Problem, formed, refusal, weights_in
from passes.budget.costs import Costs
from passes.budget.forms import WHOLE, Cuts, Form, Forms, Site
from passes.budget.latency import LatencyTable, kind
from passes.budget.linked import Linked, Shapes, link, options
from passes.budget.trial import Trial, hold_out
from passes.report import coverage
from passes.units import NATS

ROUNDINGS: dict[str, Rounding] = {"gptq": GPTQ(sweeps=0), "nearest": Nearest(search=True)}
UNITS = {"model": NATS, "layer": "relative errors"}


@dataclass(frozen=True)
class Budgeted(Pass):
    """Choose for annotated linears among forms, with the least predicted loss that a budget allows.

    A subclass says in `linked` which linears may shrink together, and does in `run` what was decided.

    Args: as of `assign_bits`.
    """

    bits: float = 2.25
    memory: float = 0.0
    bytes: int = 0
    latency: float = 0.0
    latencies: str = ""
    widths: tuple[int | str, ...] = (2, 3, 4, 8)
    groups: tuple[int, ...] = ()
    fused: bool = True
    loss: str = "model"
    rounding: str = "gptq"
    tokens: int = 8192
    file: str = ""
    measure: int = 0
    corrections: int = 0
    seed: int = 0
    files: ClassVar[tuple[str, ...]] = ("file", "latencies")
    targeted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        where = self.name()
        for name in ("widths", "groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        others = (self.memory, self.bytes, self.latency)
        if not self.bits > 0 or min(others) < 0 or sum(map(bool, others)) > 1:
            raise OptionError("there is one budget, and it is positive", where=where, remedy="give bits=2.25, or bytes=10_000_000")
        if self.latency and not self.latencies:
            raise OptionError("latencies are kept in a file", where=f"{where}(latency=...)", remedy="give latencies='latencies.json'")
        schemes = [width for width in self.widths if isinstance(width, str)]
        for scheme in schemes:
            bits_of(scheme, f"{where}(widths=...)")
        numbers = [width for width in self.widths if width not in schemes]
        if not self.widths or any(type(width) is not int or not 1 <= width <= 8 for width in numbers):
            problem = f"widths are whole numbers from 1 to 8, or schemes, not {list(self.widths)}"
            raise OptionError(problem, where=f"{where}(widths=...)", remedy="give widths=(2, 3, 4, 8), or widths=('W4A4', 'W8A8')")
        if any(type(group) is not int or (group < 1 and group != -1) for group in self.groups):
            raise OptionError(f"groups have at least one weight, or are -1, not {list(self.groups)}", where=f"{where}(groups=...)")
        if self.measure < 0 or self.corrections < 0:
            raise OptionError("tokens to measure on and corrections are not negative", where=where)
        if self.corrections and not self.measure:
            raise OptionError("corrections are measured", where=f"{where}(corrections=...)", remedy="give measure=4096, a number of tokens")
        for given, known in ((self.loss, tuple(UNITS)), (self.rounding, tuple(ROUNDINGS))):
            if given not in known:
                raise OptionError(f"{given!r} is not one of {list(known)}", where=where)

    def needs(self, ctx: Context) -> None:
        """A budget that widths alone do not rule out; calibration data, or a file of costs if nothing is measured; folders for files."""
        if self.each < self.narrowest and not (self.bytes or self.latency):
            name, scale = ("memory", FLOAT) if self.memory else ("bits", 1)
            remedy = f"give {name}={self.narrowest / scale:g} at least, or smaller widths"
            raise OptionError(f"no choice fits into {name}={self.each / scale:g}", where=self.name(), remedy=remedy)
        if self.measure or not (self.file and Path(self.file).exists()):
            self.need_calibration(ctx)
        for name in filter(None, (self.file, self.latencies)):
            if not Path(name).absolute().parent.is_dir():
                raise DataError("there is no such folder to write into", where=name, remedy="make it, or name another file")

    @property
    def each(self) -> float:
        """The budget in bits for each weight, where it is one of these."""
        return FLOAT * self.memory or self.bits

    @property
    def narrowest(self) -> float:
        """Bits that each weight takes at least, whatever the model; its scales come on top."""
        return min(bits_of(width, self.name())[0] if isinstance(width, str) else width for width in self.widths)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Annotated linears, options that the backend has, inputs that may change, and a budget that something fits into."""
        sites = self.sites(gm)
        if not sites:
            raise OptionError(f"{self.name()} needs annotated linears", remedy=f"put annotate before {self.name()}")
        rounded = next((layer.path for site in sites for layer in site if layer.input_rounded), None)
        if rounded is not None and any(isinstance(width, str) for width in self.widths):
            raise OptionError("the input is rounded already", where=rounded, remedy=f"put {self.name()} before quantize")
        problem = self.problem(gm, ctx, self.linked(gm, ctx, sites, scored=False), defaultdict(float))
        if problem.least > problem.budget:
            remedy = f"the least budget is {self._nearest(gm, problem)}, or give smaller widths"
            raise OptionError(f"no choice fits into {self}", remedy=remedy)

    def _nearest(self, gm: GraphModule, problem: Problem) -> str:
        """The least budget that something fits into, as the option that was given."""
        least = problem.least
        if self.latency:
            return f"latency={-(-least // 1000) / 1000}"
        if self.bytes:
            return f"bytes={-(-least // 8) + _rest(gm)}"
        if self.memory:
            return f"memory={-(-100_000 * least // (FLOAT * problem.weights)) / 100_000}"
        return f"bits={-(-1000 * least // problem.weights) / 1000}"

    def linked(self, gm: GraphModule, ctx: Context, sites: Sequence[Site], *, scored: bool) -> list[Linked]:
        """Which sites shrink together: each stays as large as it is.

        Args:
            scored: say also which units are to stay, and not only how many.
        """
        return link(sites, (), (), ())

    def cuts(self, linked: Sequence[Linked]) -> Cuts:
        """Which rows and columns smaller forms keep."""
        return WHOLE

    def plans(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked], predicted: Costs) -> dict[str, Problem]:
        """By name the problems whose solutions are tried: see `fit_budget`."""
        return {"": self.problem(gm, ctx, linked, predicted)}

    def decide(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked]) -> Allocation:
        """Predict, choose, and perhaps measure and choose again."""
        known, held = hold_out(ctx, self.measure, self.seed)
        cuts = self.cuts(linked)
        predicted = self._costs(gm, known, self._wanted(ctx, linked), cuts)
        plans = self.plans(gm, ctx, linked, predicted)
        problem = next(iter(plans.values()))
        if not self.measure:
            made = problem.solve()
            findings.tell(ctx, made, UNITS[self.loss], self.name())
            return made
        trial = Trial(gm, known, held, ROUNDINGS[self.rounding], cuts)
        if len(plans) > 1:
            tried = {plan: problem.solve() for plan, problem in plans.items()}
            measured = trial.divergences([made.forms() for made in tried.values()])
            finished = self.finished(gm, trial, linked, list(tried.values()), measured)
            ranks = finished or dict(enumerate(measured))
            least = min(ranks, key=lambda index: ranks[index])
            problem = list(plans.values())[least]
            findings.tell_plans(ctx, tried, measured, finished, least, UNITS[self.loss])
        looks = correction.corrected(problem, trial, self.corrections)
        taken = correction.best(looks)
        findings.tell(ctx, taken.allocation, UNITS[self.loss], self.name())
        findings.tell_measures(ctx, looks, correction.interactions(taken, trial), UNITS[self.loss], self.name())
        return taken.allocation

    def finished(
        self, gm: GraphModule, trial: Trial, linked: Sequence[Linked], tried: Sequence[Allocation], measured: Sequence[float]
    ) -> dict[int, float]:
        """By number what choices are measured at behind what is to follow, nats a token; none if that is not known."""
        return {}

    def sites(self, gm: GraphModule) -> list[list[Layer]]:
        """The annotated linears that share a choice, in graph order."""
        found: dict[Node, list[Layer]] = {}
        for layer in unrounded(gm):
            if layer.kind == "Linear":
                found.setdefault(layer.site("input").operand if self.fused else layer.node, []).append(layer)
        return list(found.values())

    def _forms(self, ctx: Context, site: Site, shapes: Shapes) -> list[Forms]:
        """What a site may become on this backend at these shapes, each width with each group."""
        made: dict[Forms, None] = {}
        for forms in self._all_forms(site, shapes):
            if not any(refusal(ctx, layer, form) for layer, form in zip(site, forms, strict=True)):
                made[forms] = None
        return list(made)

    def _all_forms(self, site: Site, shapes: Shapes) -> Iterator[Forms]:
        for width in self.widths:
            for group in self.groups or (None,):
                yield tuple(formed(layer, width, group, shapes.get(layer)) for layer in site)

    def _wanted(self, ctx: Context, linked: Sequence[Linked]) -> dict[Layer, list[Form]]:
        """All forms that linears may take."""
        found: dict[Layer, dict[Form, None]] = {}
        for own in linked:
            for shapes in map(own.shapes, own.ways):
                for site in own.sites:
                    for forms in self._forms(ctx, site, shapes):
                        for layer, form in zip(site, forms, strict=True):
                            found.setdefault(layer, {})[form] = None
        return {layer: list(forms) for layer, forms in found.items()}

    def problem(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked], known: Costs) -> Problem:
        """The options, with their costs; latencies are measured if their file is not there yet."""
        bare = Problem([own.layers for own in linked], [], known, *self._budget(gm, ctx, linked))
        found = []
        for own in linked:
            found.append(options(own, partial(self._forms, ctx), bare.option))
            if not found[-1]:
                pairs = (pair for site in own.sites for forms in self._all_forms(site, {}) for pair in zip(site, forms, strict=True))
                reasons = {refusal(ctx, layer, form) for layer, form in pairs}
                remedy = "; ".join(sorted(filter(None, reasons)))
                raise CoverageError("no width is left to choose from", where=own.layers[0].path, remedy=remedy)
        problem = replace(bare, options=found)
        return replace(problem, budget=max(problem.budget, problem.least)) if ctx.part else problem

    def _budget(self, gm: GraphModule, ctx: Context, linked: Sequence[Linked]) -> tuple[int, LatencyTable | None]:
        """In bits of codes, scales and zero points; or in nanoseconds, with a table."""
        weights = sum(weights_in(own.layers) for own in linked)
        if not self.latency:
            return (8 * (self.bytes - _rest(gm)) if self.bytes else int(self.each * weights + 1e-6)), None
        kinds = list(dict.fromkeys(kind(layer, form) for layer, forms in self._wanted(ctx, linked).items() for form in forms))
        path, backend = Path(self.latencies), ctx.backend
        if backend is None:
            raise OptionError("a latency is of a target", where=f"{self.name()}(latency=...)", remedy="compile for a backend")
        if not ctx.ranks.told(path.exists):
            if ctx.ranks.first:
                LatencyTable.measured(ctx, backend, kinds).save(path)
            ctx.ranks.everyone(None)  # the table is there
        return round(1e6 * self.latency), LatencyTable.load(path, backend.name, kinds)

    def made(self) -> dict[str, Any]:
        """The options that predictions depend on."""
        made = {"loss": self.loss, "rounding": self.rounding, "tokens": self.tokens, "seed": self.seed}
        return made | ({"held": self.measure} if self.measure else {})

    def _costs(self, gm: GraphModule, ctx: Context, wanted: Mapping[Layer, Sequence[Form]], cuts: Cuts) -> Costs:
        """Predicted, or read from a file."""
        if self.file and ctx.ranks.told(Path(self.file).exists):
            found = costs.load(Path(self.file), self.made())
            pairs = ((layer, form) for layer, forms in wanted.items() for form in forms)
            missing = next((f"{layer.path} as {form}" for layer, form in pairs if (layer.path, str(form)) not in found), None)
            if missing:
                raise DataError(f"the costs lack {missing}", where=self.file, remedy="remove the file to predict anew")
            return found
        rounding = ROUNDINGS[self.rounding]
        found = (
            costs.model_costs(gm, ctx, wanted, rounding, self.tokens, self.seed, cuts)
            if self.loss == "model"
            else costs.layer_costs(gm, ctx, wanted, rounding, cuts)
        )
        if self.file and ctx.ranks.first:
            costs.save(found, self.made(), Path(self.file))
        return found


def _rest(gm: GraphModule) -> int:
    """Bytes of all that is not chosen for."""
    chosen = {layer.weight: edit.attribute(gm, layer.weight).nbytes for layer in unrounded(gm) if layer.kind == "Linear"}
    return coverage(gm, ()).stored - sum(chosen.values())
