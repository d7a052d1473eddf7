"""`Pipeline`: a pass made of passes, with a text form both ways; it owns the contract that every pass is run under."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from ir.errors import BackendError, CoverageError, DataError, FxpressError, OptionError, PassError, RanksError
from ir.memory import give_back
from ir.text import graph_text
from ir.verify import verify
from passes import registry
from passes.base import Context, Effect, Pass, Record
from passes.calls import parse_calls
from passes.data.portions import REMEDY, out_of_memory
from passes.preflight.resources import watched
from passes.probe import model_outputs, relative_error
from passes.support import refuse_unsupported

# Greatest relative error of the outputs that rounding may cause in a pass that keeps the function, by the narrowest dtype computed in:
# a float64 Llama computes its norms in float32.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CALLERS = (BackendError, CoverageError, DataError, OptionError, RanksError)  # what the caller can mend keeps its kind


@dataclass(frozen=True)
class Pipeline(Pass):
    """Run passes in order, each under its contract: needs (all, first) → requires → run → clean → verify → check of its effect → record.

    Text form: the passes' own, separated by commas. `Pipeline.parse` reads it back; it takes names and calls with literal keyword arguments
    and evaluates nothing.
    """

    passes: tuple[Pass, ...] = ()
    effect: ClassVar[Effect] = Effect.CHANGE

    @classmethod
    def of(cls, pipeline: "str | Pass | Iterable[Pass]") -> "Pipeline":
        """A pipeline from its text, a pass, or a sequence of passes and pipelines, flattened."""
        if isinstance(pipeline, str):
            return cls.parse(pipeline)
        items = [pipeline] if isinstance(pipeline, Pass) else list(pipeline)
        flat: list[Pass] = []
        for item in items:
            if not isinstance(item, Pass):
                raise OptionError(f"{item!r} is not a pass", where="pipeline", remedy="give instances, DropDropout(), or pipeline text")
            flat.extend(item.passes if isinstance(item, Pipeline) else [item])
        return cls(tuple(flat))

    @classmethod
    def parse(cls, text: str) -> "Pipeline":
        """The pipeline that `text` states; the exact inverse of `str`.

        Raises:
            OptionError: malformed text, an unknown name or option, a value that is not a literal.
        """
        return cls.of([registry.build(name, options, where=text[:200]) for name, options in parse_calls(text)])

    def __str__(self) -> str:
        return ", ".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Run every pass under its contract and return the number of sites changed."""
        return sum(record.sites for record in self.execute(gm, ctx))

    def execute(self, gm: GraphModule, ctx: Context) -> list[Record]:
        """Run every pass under its contract. Errors name the pass and what ran before it, with the cause chained.

        Raises:
            PassError: a pass failed or broke its effect's promise.
            CoverageError, DataError, OptionError: a pass cannot run on what the caller gave.
        """
        for step in self.passes:
            try:
                step.needs(ctx)
            except FxpressError as error:
                raise _failure(step, [], error) from error
        records: list[Record] = []
        before = model_outputs(gm, ctx.probe)
        for index, step in enumerate(self.passes):
            ctx.progress.say(f"[{index + 1}/{len(self.passes)}] {step}")
            try:
                with ctx.memo.during(step, gm, ctx), watched() as peak:
                    record, before = _run_one(step, gm, ctx, before)
            except Exception as error:
                raise _failure(step, records, error) from error
            records.append(replace(record, peak_bytes=peak.resident, own_bytes=peak.own))
            give_back()  # so that what a pass took and left adds nothing to the peak of the next
        return records


def _failure(step: Pass, records: list[Record], error: Exception) -> FxpressError:
    ran = f"after {', '.join(record.text for record in records) or 'nothing'}"
    if not isinstance(error, FxpressError):
        if out_of_memory(error):
            return DataError(f"pass {step} failed: memory runs out: {str(error).splitlines()[0]}", where=ran, remedy=REMEDY)
        return PassError(f"pass {step} failed: {type(error).__name__}: {error}", where=ran)
    kind = type(error) if isinstance(error, CALLERS) else PassError
    return kind(f"pass {step} failed: {error.what}", where="\n".join(filter(None, [error.where, ran])), remedy=error.remedy)


def _run_one(step: Pass, gm: GraphModule, ctx: Context, before: tuple[Tensor, ...]) -> tuple[Record, tuple[Tensor, ...]]:
    step.requires(gm, ctx)
    text = graph_text(gm, annotations=step.effect is Effect.OBSERVE) if step.effect in {Effect.OBSERVE, Effect.ANNOTATE} else ""
    limit = _rounding(gm)
    skipped = len(ctx.skipped)
    started = time.perf_counter()
    sites = step.run(gm, ctx)
    seconds = time.perf_counter() - started
    if text:
        if graph_text(gm, annotations=step.effect is Effect.OBSERVE) != text:
            raise PassError(f"{step.name()} declares the effect {step.effect.value.upper()} but changed the graph")
        if step.effect is Effect.ANNOTATE:
            refuse_unsupported(gm, ctx)
            _agree(step, gm, ctx)
        return Record(str(step), step.effect, sites, seconds, None, tuple(ctx.skipped[skipped:])), before
    edit.clean(gm)
    verify(gm, stage=str(step))
    if sites:
        ctx.statistics = None
    after = model_outputs(gm, ctx.probe) if sites else before
    difference = relative_error(after, before)
    _agree(step, gm, ctx, after, limit)
    if step.effect is Effect.PRESERVE and not difference <= limit:
        raise PassError(f"{step.name()} declares the effect PRESERVE but changed the outputs by {difference:.2g} (allowed {limit:g})")
    if not all(torch.isfinite(output).all() for output in after if output.is_floating_point()):
        raise PassError(f"the outputs are not finite after {step}", remedy="a wider encoding, or more calibration data")
    return Record(str(step), step.effect, sites, seconds, difference, tuple(ctx.skipped[skipped:])), after


def _agree(step: Pass, gm: GraphModule, ctx: Context, outputs: tuple[Tensor, ...] = (), limit: float = 0.0) -> None:
    """Refuse models that a pass has made different on different processes, by more than machines round differently."""
    if ctx.ranks.world == 1:
        return
    ctx.ranks.agree(graph_text(gm), f"graph after {step}")
    (first,) = ctx.ranks.collect([0], [{str(index): output for index, output in enumerate(outputs)}])
    apart = ctx.ranks.everyone(relative_error(outputs, tuple(first[str(index)] for index in range(len(outputs)))))
    other = next((rank for rank, error in enumerate(apart) if not error <= limit), None)
    if other is not None and all(torch.isfinite(output).all() for output in first.values() if output.is_floating_point()):
        raise RanksError(f"after {step} process {other} has another model than process 0", remedy="use machines of one kind for all")


def _rounding(gm: GraphModule) -> float:
    computed = (node.meta.get("val") for node in gm.graph.nodes if node.op == "call_function")
    return max((ROUNDING.get(fake.dtype, 0.0) for fake in computed if isinstance(fake, Tensor)), default=0.0)
