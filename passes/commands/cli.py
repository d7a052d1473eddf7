"""The command line: `fxpress compile | eval | generate | passes | inspect | report | compare | cache`. A command parses, calls and prints.

What needs torch is imported inside of the commands, so that `--help` and bad usage are answered at once.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from ir.errors import FxpressError
from passes.commands import cache as cache_command
from passes.commands import console
from passes.commands.signals import Ended, ended_by_signals


class _Commands(TyperGroup):
    """Errors that fxpress raises on purpose become one message and exit code 1; signals to end 130 and 143, after clearing up."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with ended_by_signals():
                return super().invoke(ctx)
        except Ended as signal:
            typer.echo(f"{signal}: what was not complete is removed", err=True)
            raise typer.Exit(signal.code) from signal
        except FxpressError as error:
            rank = os.environ.get("RANK")  # where torchrun has started several processes
            typer.echo(f"error in process {rank}: {error}" if rank else f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help="Compress language models."
)

Window = Annotated[int, typer.Option(min=2, help="Tokens in a window of text.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of the text to measure on, from its beginning.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto (the checkpoint's own): the dtype to load in.")]
NoOpen = Annotated[bool, typer.Option("--no-open", help="Only print where the page is.")]
Model = Annotated[str, typer.Argument(help="A folder with a checkpoint, or a model on the Hub.")]


@app.command("compile")
def compile_(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    pipeline: Annotated[str, typer.Option(help="A preset, or passes: 'w4a16(group=32)'.")] = "",
    recipe: Annotated[Path | None, typer.Option(help="Replay this recipe.yaml instead, on the same windows of the same texts.")] = None,
    calibration: Annotated[list[Path] | None, typer.Option(help="A text file to calibrate on; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="reference, onnx, hf, or another one's entry point. [default: the recipe's, or onnx]")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    window: Window = 256,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [default: the recipe's, or 0]")] = None,
    text: Annotated[Path | None, typer.Option(help="Measure perplexity on this text, before and after.")] = None,
    windows: Windows = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Leave layers that the backend cannot run as they are.")] = False,
    dtype: Dtype = "float32",
    preflight: Annotated[
        bool | None, typer.Option(help="Run one block through all of it first. [default: from 1 GB of weights on]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run one block, print what the rest would take, and stop.")] = False,
    cache: cache_command.Folder = None,
    cache_size: cache_command.Size = 20,
    no_cache: cache_command.Off = False,
) -> None:
    """Compress a model and write a folder that runs. What was killed goes on where it was, by the same command.

    Under torchrun the processes share the work, and the first one writes.
    """
    if bool(pipeline) == (recipe is not None):
        raise typer.BadParameter("give either --pipeline or --recipe")
    import passes
    from passes import registry
    from passes.commands import loading
    from passes.commands.evaluation import quality
    from passes.data.calibration import token_windows
    from passes.folders import check_free, claimed
    from passes.preflight.resources import existing

    ranks = passes.Ranks.from_environment()
    if ranks.first:
        check_free(out, overwrite)
    replay = passes.Recipe.read(recipe) if recipe else None
    steps = replay or passes.Pipeline.parse(pipeline)
    target = backend or (replay.backend if replay else "onnx")
    registry.backend(target)
    seed = seed if seed is not None else replay.seed if replay else 0
    calibration_text = loading.read_texts(calibration) if calibration else ""
    test_text = loading.read_texts([text]) if text else ""
    tokenizer = loading.load_tokenizer(model, needed=bool(calibration_text or test_text))
    batches = loading.calibration_batches(calibration_text, tokenizer, samples, window, seed) if calibration_text else None
    ids = token_windows(test_text, tokenizer, window, windows) if test_text else None
    original = loading.load_model(model, dtype, scratch=existing(out.resolve().parent))
    console.quiet()
    options: dict[str, Any] = {"seed": seed, "allow_partial": allow_partial, "progress": console.progress(), "ranks": ranks, "out": out}
    if dry_run:
        found = passes.estimate(original, steps, batches, target, **options)
        console.show(found.page() if found else "the model has too few layers to tell from one what the others take")
        return
    with claimed(out) if ranks.first else contextlib.nullcontext():
        memo = cache_command.memo(no_cache, cache, cache_size)
        compiled = passes.compile(original, steps, batches, target, tokenizer=tokenizer, preflight=preflight, cache=memo, **options)
        ranks.close()
        if not ranks.first:
            return
        if ids is not None and text is not None:
            measured = {f"{text.name}, before": quality(original, ids), f"{text.name}, after": quality(compiled, ids, original)}
            compiled.report().measures.update(measured)
        compiled.save(out, overwrite=overwrite)
    console.show(*compiled.report().page(), f"on disk: {console.megabytes(Path(model))} before, {console.megabytes(out)} after, in {out}")


app.command("cache")(cache_command.cache)


@app.command("eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A folder that fxpress wrote, a checkpoint's folder, or a model on the Hub.")],
    text: Annotated[Path, typer.Option(help="The text to measure on.")],
    reference: Annotated[str, typer.Option(help="The original: a checkpoint's folder, or a model on the Hub.")] = "",
    windows: Windows = 100,
    window: Window = 256,
    dtype: Dtype = "float32",
) -> None:
    """Measure perplexity on a text, and divergence from the original."""
    from passes.commands import loading
    from passes.commands.evaluation import quality
    from passes.compiled import load
    from passes.data.calibration import token_windows

    content = loading.read_texts([text])
    measured: Any = load(model) if loading.is_compiled(model) else loading.load_model(model, dtype)
    original = loading.load_model(reference, dtype) if reference else None
    ids = token_windows(content, loading.load_tokenizer(model), window, windows)
    rows = {model: quality(measured, ids, original)}
    if original is not None:
        rows = {reference: quality(original, ids), **rows}
    columns = list(dict.fromkeys(key for values in rows.values() for key in values))
    table = Table(f"{text.name}, {ids.shape[0]} windows of {ids.shape[1]} tokens", *columns)
    for name, values in rows.items():
        table.add_row(name, *(f"{values[key]:.4g}" if key in values else "" for key in columns))
    console.show(table)
    if original is None:
        console.show("without --reference there is no comparison with the original")


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="A folder that `fxpress compile` wrote.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; may be repeated.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Continue prompts greedily."""
    from passes.commands.continuation import Continuation
    from passes.commands.loading import load_tokenizer
    from passes.compiled import load

    model = load(directory)
    run = Continuation(model if device == "cpu" else model.to(device), load_tokenizer(directory), prompt)
    if len(prompt) == 1:
        typer.echo(prompt[0], nl=False)
        for piece in run.stream(tokens):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
    else:
        list(run.stream(tokens))
        typer.echo("\n\n".join(map(str.__add__, prompt, run.texts())))
    typer.echo(run.speed(), err=True)


@app.command("passes")
def passes_(markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/reference/passes.md.")] = False) -> None:
    """List all passes and presets with their options."""
    from passes.commands import catalogue

    if markdown:
        typer.echo(catalogue.markdown())
    else:
        console.show(*(sheet.rich() for sheet in catalogue.catalogue()))


@app.command("inspect")
def inspect_(
    model: Model,
    pipeline: Annotated[str, typer.Option(help="Show what this preset, or these passes, would cover.")] = "canonicalize",
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's text too.")] = False,
    backend: Annotated[str, typer.Option(help="Whose limits to apply.")] = "reference",
    dtype: Dtype = "float32",
) -> None:
    """Show a model's groups of layers, its blocks, and what a pipeline would cover. Nothing is written."""
    from ir.text import graph_text
    from passes import registry
    from passes.base import Context
    from passes.commands import inspection
    from passes.commands.loading import load_model
    from passes.pipeline import Pipeline

    steps = Pipeline.parse(pipeline)
    ctx = Context(backend=registry.backend(backend), allow_partial=True)
    gm = inspection.annotated(load_model(model, dtype), steps, ctx)
    if graph:
        typer.echo(graph_text(gm))
    console.show(*inspection.tables(gm, ctx), *(f"note: {note}" for note in ctx.notes))


@app.command("report")
def report_(
    directory: Annotated[Path, typer.Argument(help="A folder that `fxpress compile` wrote.")],
    no_open: NoOpen = False,
) -> None:
    """Open the report of a compressed model in the browser."""
    from passes import page

    console.browse(page.write_report(directory), no_open)  # drawn anew: a page that came with the folder may hold anything


@app.command("compare")
def compare_(
    first: Annotated[Path, typer.Argument(help="A folder that `fxpress compile` wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("compare.html"),
    no_open: NoOpen = False,
) -> None:
    """Put two compiles side by side, as a table and as a page in the browser."""
    from passes import page

    path, tables = page.write_comparison(first, second, out)
    console.show(*tables)
    console.browse(path, no_open)
