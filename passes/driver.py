"""`compile`: capture, run the pipeline, lower."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ir import edit
from ir.errors import DataError
from passes import registry
from passes.backend import Backend
from passes.base import Context, Pass
from passes.calls import call_text
from passes.compiled import Compiled
from passes.folders import temporary_files
from passes.layerwise import View, layer_rows, part_rows, read_rows
from passes.memo.folder import Memo
from passes.memo.results import Results
from passes.preflight.estimates import TABLE, Estimate
from passes.preflight.plan import plan, wanted
from passes.preflight.resources import watched
from passes.probe import model_outputs, relative_error
from passes.progress import Progress
from passes.ranks import Ranks
from passes.recipe import Recipe, versions
from passes.report import Report, coverage, left_out
from passes.start import begin


def compile(
    model: nn.Module,
    pipeline: str | Pass | Iterable[Pass] | Recipe = "w4a16",
    calibration: Iterable[Any] | None = None,
    backend: str | Backend | None = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    allow_partial: bool = False,
    progress: Progress | None = None,
    cache: Memo | str | Path | bool | None = None,
    ranks: Ranks | None = None,
    preflight: bool | None = None,
    out: str | Path | None = None,
    scratch: str | Path | None = None,
) -> Compiled:
    """Compress a model.

    Args:
        model: a `PreTrainedModel`, any module (with example `args`/`kwargs`), or a captured graph. It is left bit-identical.
        pipeline: a preset's name or pipeline text, passes, or a recipe to replay.
        calibration: batches: dicts of inputs, token tensors, or a `DataLoader`.
        backend: "reference" (default; the recipe's own in a replay), "onnx", "hf", another one's entry point, or an object.
        args: example positional inputs, for plain modules.
        kwargs: example keyword inputs.
        seed: of everything random.
        tokenizer: a tokenizer, or a folder with its files, to save beside the result; by default the model's own folder.
        allow_partial: leave layers that the backend does not support as they are, instead of refusing.
        progress: how to show it.
        cache: a folder that results are kept in and taken from, so that a compile which was killed goes on where it was; True for the one
            of the user, `~/.cache/fxpress`. What is written is the same with and without.
        ranks: the processes that share the work, each of which calls this with the same arguments: `Ranks.from_environment()`. All get the
            same graph; only the first lowers it to the backend and is to save it, the others' results run the graph.
        preflight: run one block through all of it first, estimate what the rest takes, and refuse what there is no room for; None: if
            there is a gigabyte of weights.
        out: the folder that will be saved to, for the pre-flight to look at its disk.
        scratch: a folder on a disk for what passes make of weights, in files that go away with the process; None keeps it in memory, of a
            model of `load_model` where its own are.

    Raises:
        FxpressError: one of its kinds; bad input is refused before any long work.
    """
    started = time.perf_counter()
    start = begin(model, pipeline, calibration, backend, args, kwargs, seed, ranks, scratch)
    gm, steps, target, ctx = start.gm, start.steps, start.target, start.ctx
    ctx.progress, ctx.allow_partial = _shown(progress, ctx.ranks), allow_partial
    found = plan(gm, steps, ctx, target, Path(out) if out else None) if wanted(gm, preflight) else None
    if found:
        ctx.progress.show(found.page())
    ctx.original = edit.copied(gm)
    ctx.memo = Results(Memo.of(cache), f"{type(model).__name__}, {steps}", ctx.ranks)
    ctx.memo.begin(gm, ctx, start.marks)
    original = _original(gm, ctx)
    before = View.of(gm, ctx)
    running = time.perf_counter()
    trace = steps.execute(gm, ctx)
    checks = time.perf_counter() - running - sum(record.seconds for record in trace)
    target = target if ctx.ranks.first else registry.backend("reference")
    ctx.progress.say(f"lowering to {target.name}")
    remarks: list[str] = []
    lowering = time.perf_counter()
    with watched() as peak, temporary_files():
        executable = target.lower(gm, gm.meta["example"], remarks)
    if found:
        ctx.tables[TABLE] = found.compared(trace, checks, time.perf_counter() - lowering, peak)
    after = View.of(gm, ctx)
    report = Report(
        model=type(model).__name__,
        pipeline=str(steps),
        backend=target.name,
        trace=trace,
        coverage=coverage(gm, ctx.skipped),
        skipped=left_out(gm, ctx.skipped),
        notes=[*ctx.notes, *remarks],
        tables=ctx.tables,
        layers=layer_rows(gm, after),
        reads=read_rows(gm, before, after),
        parts=part_rows(before, after),
        difference=relative_error(model_outputs(gm, ctx.probe), original),
        seconds=time.perf_counter() - started,
        peak_bytes=_peak_bytes(),
        target=executable.report(),
        lowering=len(remarks),
    )
    made = Recipe(
        pipeline=str(steps),
        backend=call_text(target.name, target),
        seed=ctx.seed,
        versions=versions(),
        weights=start.marks[0],
        calibration=start.marks[1],
    )
    return Compiled(executable, gm.meta["signature"], target.name, gm, report, made, tokenizer or _own_folder(gm))


def estimate(
    model: nn.Module,
    pipeline: str | Pass | Iterable[Pass] | Recipe = "w4a16",
    calibration: Iterable[Any] | None = None,
    backend: str | Backend | None = None,
    *,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_partial: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    out: str | Path | None = None,
    scratch: str | Path | None = None,
) -> Estimate | None:
    """What `compile` would take with these arguments, by a real run of one block through all of it; None for models of too few layers.

    Raises:
        FxpressError: what `compile` would refuse, and what there is no room for.
    """
    start = begin(model, pipeline, calibration, backend, args, kwargs, seed, ranks, scratch)
    start.ctx.progress, start.ctx.allow_partial = _shown(progress, start.ctx.ranks), allow_partial
    return plan(start.gm, start.steps, start.ctx, start.target, Path(out) if out else None)


def _shown(progress: Progress | None, ranks: Ranks) -> Progress:
    """The first process shows progress, and no other."""
    return (progress or Progress()) if ranks.first else Progress(silent=True)


def _original(gm: GraphModule, ctx: Context) -> tuple[Tensor, ...]:
    """The outputs on the probe before any pass.

    Raises:
        DataError: the model fails there, or its outputs are not finite.
    """
    source = "calibration data" if ctx.calibration else "example inputs"
    try:
        outputs = model_outputs(gm, ctx.probe)
    except (IndexError, RuntimeError, ValueError) as error:
        raise DataError(f"the model cannot run on the {source}: {error}", remedy="look for tokens outside of the vocabulary") from error
    if not all(torch.isfinite(output).all() for output in outputs if output.is_floating_point()):
        raise DataError(f"the model's own outputs on the {source} are not finite", remedy="look at the model, or use a wider dtype")
    return outputs


def _own_folder(gm: GraphModule) -> Path | None:
    """The local folder that a Hugging Face model was loaded from."""
    path = Path(getattr(gm.meta.get("config"), "name_or_path", "") or "/nowhere")
    return path if path.is_dir() else None


def _peak_bytes() -> int:
    """The process's greatest resident size so far; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415 (a module of Unix)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
