"""`assign_bits`: choose the widths of every weight and input by what rounding costs the whole model, under one budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import CoverageError, DataError, OptionError
from ir.rounding import GPTQ, Nearest, Rounding
from ir.schemes import bits_of
from ir.sites import Layer
from ir.weights import unrounded
from passes import correction, costs, findings
from passes.allocation import Allocation, Marks, Problem, Site, marked, refusal, weights_in
from passes.base import Context, Effect, Pass
from passes.latency import LatencyTable, kind
from passes.report import coverage
from passes.trial import Trial, hold_out
from passes.units import NATS

ROUNDINGS: dict[str, Rounding] = {"gptq": GPTQ(sweeps=0), "nearest": Nearest(search=True)}
UNITS = {"model": NATS, "layer": "relative errors"}


@dataclass(frozen=True)
class AssignBits(Pass):
    """Give annotated linears the widths and groups with the least predicted loss that a budget allows.

    Before::

        %2 = aten.linear(%1, %q) {weight: u4[1,64]}; %9 = aten.linear(%8, %down) {weight: u4[1,64]}

    After::

        %2 = aten.linear(%1, %q) {weight: u2[1,64]}; %9 = aten.linear(%8, %down) {weight: u3[1,64]}

    An option is a pair, the encodings of a linear's weight and of its input. Its loss is predicted from one run:
    `½ Σ_n h_n ((ΔW G ΔWᵀ)_nn + (Ŵ D Ŵᵀ)_nn)` nats a token, with `G = E[xxᵀ]` of the layer's inputs, `h_n` the mean squared gradient of the
    model's log likelihood at output `n` (the diagonal of its Fisher information), `ΔW` what the rounding really leaves of the weight, and
    `D = E[Δx Δxᵀ]` of the inputs. Options are chosen by an exact knapsack (HiGHS), whose bound is reported. Linears that read one tensor
    share their encodings, since runtimes fuse them. A budget in bits or bytes counts weights only: of options that differ in their inputs
    alone the one with less loss is taken, the wider. A latency counts both.

    `measure` holds tokens out of the predictions and measures on them: the KL `K(all)` of the model from itself with all chosen encodings;
    with one site at a time in floating point, what each adds, `K(all) − K(all∖i)`; and for pairs of the greatest
    `K(all) − K(all∖i) − K(all∖j) + K(all∖{i,j})`. A correction multiplies the predicted costs of a site by measured over predicted and
    solves again; the allocation that measured least is kept. Weights and inputs are rounded as for the predictions.

    Limits: 1. whole linears: columns of one linear share their widths, unless `split_channels` has made linears of them; 2. interactions
    between layers are not predicted, only measured; 3. static inputs are predicted and measured over each batch's own range; 4. the clips
    of inputs stay as annotated, whatever the width: choose them afterwards, by `clip_activations`.

    Args:
        bits: budget: bits per weight of the annotated linears, with scales and zero points.
        bytes: budget in place of `bits`: bytes of the model as it will be stored, with everything that is not quantized.
        latency: budget in place of `bits`: milliseconds that all annotated linears together take for one token on the target.
        latencies: the file with the target's table of latencies; if there is none, it is measured on this machine and written there.
        widths: to choose among: of weights, 1 to 8, inputs as they are annotated; or schemes such as "W4A8", which state both.
        groups: group sizes to choose among, -1 for whole channels; none: as annotated.
        fused: linears that read one tensor share their encoding.
        loss: "model", or "layer": the relative squared error of each layer's own output, which knows nothing of the others.
        rounding: that predictions are made with, "gptq" or "nearest".
        tokens: that gradients are taken from.
        file: load predictions from this file if it exists, else write them there: another budget is then chosen in seconds.
        measure: tokens held out to measure on, at most half of the samples; 0 measures nothing. Each site is left out in turn: time grows
            with the square of the layers.
        corrections: rounds of measuring, correcting and solving again.
        seed: of what is drawn.

    Raises:
        OptionError: a width that there is not, a budget that nothing fits into; the remedy names the nearest that works.
        CoverageError: the backend has no form for any of the options.
        DataError: no calibration data, or a file that does not fit.
    """

    bits: float = 2.25
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
    effect: ClassVar[Effect] = Effect.ANNOTATE

    def __post_init__(self) -> None:
        for name in ("widths", "groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.bits > 0 or self.bytes < 0 or self.latency < 0 or (self.bytes and self.latency):
            raise OptionError("there is one budget, and it is positive", where="assign_bits", remedy="give bits=2.25, or bytes=10_000_000")
        if self.latency and not self.latencies:
            raise OptionError("latencies are kept in a file", where="assign_bits(latency=...)", remedy="give latencies='latencies.json'")
        schemes = [width for width in self.widths if isinstance(width, str)]
        for scheme in schemes:
            bits_of(scheme, "assign_bits(widths=...)")
        numbers = [width for width in self.widths if width not in schemes]
        if not self.widths or any(type(width) is not int or not 1 <= width <= 8 for width in numbers):
            problem = f"widths are whole numbers from 1 to 8, or schemes, not {list(self.widths)}"
            raise OptionError(problem, where="assign_bits(widths=...)", remedy="give widths=(2, 3, 4, 8), or widths=('W4A4', 'W8A8')")
        if any(type(group) is not int or (group < 1 and group != -1) for group in self.groups):
            raise OptionError(f"groups have at least one weight, or are -1, not {list(self.groups)}", where="assign_bits(groups=...)")
        if self.measure < 0 or self.corrections < 0:
            raise OptionError("tokens to measure on and corrections are not negative", where="assign_bits")
        if self.corrections and not self.measure:
            raise OptionError(
                "corrections are measured", where="assign_bits(corrections=...)", remedy="give measure=4096, a number of tokens"
            )
        for given, known in ((self.loss, tuple(UNITS)), (self.rounding, tuple(ROUNDINGS))):
            if given not in known:
                raise OptionError(f"{given!r} is not one of {list(known)}", where="assign_bits")

    def needs(self, ctx: Context) -> None:
        """Calibration data, or a file of costs if nothing is measured; folders for files."""
        if not ctx.calibration and (self.measure or not (self.file and Path(self.file).exists())):
            raise DataError("assign_bits needs calibration data", remedy="pass calibration=[{'input_ids': ids}, ...]")
        for name in filter(None, (self.file, self.latencies)):
            if not Path(name).absolute().parent.is_dir():
                raise DataError("there is no such folder to write into", where=name, remedy="make it, or name another file")

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Annotated linears, options that the backend has, inputs that may change, and a budget that something fits into."""
        sites = self._sites(gm)
        if not sites:
            raise OptionError("assign_bits needs annotated linears", remedy="put annotate before assign_bits")
        rounded = next((layer.path for site in sites for layer in site if layer.input_rounded), None)
        if rounded is not None and any(isinstance(width, str) for width in self.widths):
            raise OptionError("the input is rounded already", where=rounded, remedy="put assign_bits before quantize")
        problem = self._problem(gm, ctx, sites)
        least = sum(min(problem.size(site, marks) for marks in own) for site, own in zip(sites, problem.options, strict=True))
        if least > problem.budget:
            nearest = f"bits={-(-1000 * least // problem.weights) / 1000}"
            if self.latency:
                nearest = f"latency={-(-least // 1000) / 1000}"
            elif self.bytes:
                nearest = f"bytes={-(-least // 8) + _rest(gm)}"
            raise OptionError(f"no choice of widths fits into {self}", remedy=f"the least budget is {nearest}, or give smaller widths")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Predict, choose, perhaps measure, annotate; returns the number of linears whose encoding changes."""
        problem = self._problem(gm, ctx, self._sites(gm))
        known, held = hold_out(ctx, self.measure, self.seed)
        problem = replace(problem, costs=self._costs(gm, known, problem.sites, problem.options))
        made = (
            self._measured(ctx, problem, Trial(gm, known, held, ROUNDINGS[self.rounding])) if self.measure else self._chosen(ctx, problem)
        )
        chosen = made.marks()
        changed = sum(layer.mark != mark for layer, mark in chosen.items())
        for layer, mark in chosen.items():
            layer.annotate(mark)
        return changed

    def _chosen(self, ctx: Context, problem: Problem) -> Allocation:
        """By prediction alone."""
        made = problem.solve()
        findings.tell(ctx, made, UNITS[self.loss])
        return made

    def _measured(self, ctx: Context, problem: Problem, trial: Trial) -> Allocation:
        """By prediction, corrected by what was measured."""
        looks = correction.corrected(problem, trial, self.corrections)
        taken = correction.best(looks)
        findings.tell(ctx, taken.allocation, UNITS[self.loss])
        findings.tell_measures(ctx, looks, correction.interactions(taken, trial), UNITS[self.loss])
        return taken.allocation

    def _sites(self, gm: GraphModule) -> list[list[Layer]]:
        """The annotated linears that share a choice, in graph order."""
        found: dict[Node, list[Layer]] = {}
        for layer in unrounded(gm):
            if layer.kind == "Linear":
                found.setdefault(layer.site("input").operand if self.fused else layer.node, []).append(layer)
        return list(found.values())

    def _options(self, ctx: Context, site: Site) -> list[Marks]:
        """What a site may become on this backend, each width with each group."""
        made: dict[Marks, None] = {}
        reasons = set()
        for width in self.widths:
            for group in self.groups or (None,):
                marks = tuple(marked(layer, width, group) for layer in site)
                reason = next(filter(None, (refusal(ctx, layer, mark) for layer, mark in zip(site, marks, strict=True))), None)
                if reason is None:
                    made[marks] = None
                else:
                    reasons.add(reason)
        if not made:
            raise CoverageError("no width is left to choose from", where=site[0].path, remedy="; ".join(sorted(reasons)))
        return list(made)

    def _problem(self, gm: GraphModule, ctx: Context, sites: Sequence[Site]) -> Problem:
        """All but the costs; latencies are measured if their file is not there yet."""
        options = [self._options(ctx, site) for site in sites]
        if not self.latency:
            return Problem(sites, options, {}, self._budget(gm))
        pairs = (pair for site, own in zip(sites, options, strict=True) for marks in own for pair in zip(site, marks, strict=True))
        kinds = list(dict.fromkeys(kind(layer, mark) for layer, mark in pairs))
        path, backend = Path(self.latencies), ctx.backend
        if backend is None:
            raise OptionError("a latency is of a target", where="assign_bits(latency=...)", remedy="compile for a backend")
        if not path.exists():
            LatencyTable.measured(ctx, backend, kinds).save(path)
        return Problem(sites, options, {}, round(1e6 * self.latency), LatencyTable.load(path, backend.name, kinds))

    def _budget(self, gm: GraphModule) -> int:
        """In bits of codes, scales and zero points."""
        return 8 * (self.bytes - _rest(gm)) if self.bytes else int(self.bits * sum(map(weights_in, self._sites(gm))) + 1e-6)

    @property
    def _made(self) -> dict[str, str | int]:
        """The options that predictions depend on."""
        made: dict[str, str | int] = {"loss": self.loss, "rounding": self.rounding, "tokens": self.tokens, "seed": self.seed}
        return made | ({"held": self.measure} if self.measure else {})

    def _costs(self, gm: GraphModule, ctx: Context, sites: Sequence[Site], options: Sequence[Sequence[Marks]]) -> costs.Costs:
        """Predicted, or read from a file."""
        wanted = {
            layer: [marks[place] for marks in own] for site, own in zip(sites, options, strict=True) for place, layer in enumerate(site)
        }
        if self.file and Path(self.file).exists():
            found = costs.load(Path(self.file), self._made)
            missing = [
                f"{layer.path} as {mark}" for layer, marks in wanted.items() for mark in marks if (layer.path, str(mark)) not in found
            ]
            if missing:
                raise DataError(f"the costs lack {missing[0]}", where=self.file, remedy="remove the file to predict anew")
            return found
        rounding = ROUNDINGS[self.rounding]
        found = (
            costs.model_costs(gm, ctx, wanted, rounding, self.tokens, self.seed)
            if self.loss == "model"
            else costs.layer_costs(gm, ctx, wanted, rounding)
        )
        if self.file:
            costs.save(found, self._made, Path(self.file))
        return found


def _rest(gm: GraphModule) -> int:
    """Bytes of all that the pass does not choose for."""
    chosen = {layer.weight: edit.attribute(gm, layer.weight).nbytes for layer in unrounded(gm) if layer.kind == "Linear"}
    return coverage(gm, ()).stored - sum(chosen.values())
