"""Pruning on the bench model: criteria, with and without refitting, over shares of MLP channels and of heads.

    python -m tools.bench_prune ../shared/bench --out tools/results/prune.md

Nothing is chosen on the test texts. Shares of heads are what whole heads allow: one and two of
the four key/value heads of every layer, each with its two query heads.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch.fx import GraphModule

import passes
from ir import edit
from ir.sites import chosen
from passes.pruning.unit_scores import CRITERIA
from tools import bench_model
from tools.bench_model import FULL, excess, report

SHARES = {"mlp": (0.2, 0.4), "heads": (0.25, 0.5)}
WHOLE = {"mlp": "MLP channels", "heads": "heads"}
SECTIONS = ("mlp", "heads", "free", "both", "units", "masks")


@cache
def captured(folder: Path, seed: int) -> tuple[bench_model.BenchModel, GraphModule]:
    """The bench, and its model's graph: rows share what they share."""
    bench = bench_model.load(folder, seed)
    graph = passes.compile(bench.model, "canonicalize").graph
    assert graph is not None
    return bench, graph


def row(folder: Path, seed: int, pipeline: str) -> tuple[float, float, float]:
    """The share of the linears' weights that is gone, and both perplexities."""
    bench, graph = captured(folder, seed)
    made = passes.compile(graph, pipeline, bench.calibration)
    assert made.graph is not None
    before, after = (sum(edit.value(layer.weight).numel() for layer in chosen(gm)) for gm in (graph, made.graph))
    wiki, news = bench.perplexities(made)
    return 1 - after / before, wiki, news


def cells(found: tuple[float, float, float]) -> str:
    gone, wiki, news = found
    return f"{gone:.1%} | {wiki:.2f} | {news:.2f} | {excess((wiki, news), 3)}"


def line(folder: Path, seed: int, name: str, pipeline: str) -> str:
    text = f"| {name} | {cells(row(folder, seed, pipeline))} |"
    print(text, flush=True)
    return text


HEAD = "| {} | linears' weights gone | WikiText-2 | news | excess, nats |\n|---|---|---|---|---|"


def criteria(folder: Path, seed: int, what: str) -> list[str]:
    """Every criterion at every share, as it is and refitted."""
    lines = [HEAD.format(f"{WHOLE[what]}, criterion")]
    for share in SHARES[what]:
        for criterion in CRITERIA:
            for compensate in (False, True):
                options = f"share={share}, what=['{what}'], criterion='{criterion}', compensate={compensate}"
                lines.append(line(folder, seed, f"{share:.0%}, {criterion}{', refitted' * compensate}", f"prune({options})"))
    return lines


def free(folder: Path, seed: int) -> list[str]:
    """Every layer its own width, against the same width in all."""
    lines = [HEAD.format("fisher, refitted")]
    for share in (0.2, 0.4):
        for uniform in (True, False):
            name = f"{share:.0%} of the MLP channels, {'the same width in all layers' if uniform else 'each layer its own'}"
            lines.append(line(folder, seed, name, f"prune(share={share}, what=['mlp'], uniform={uniform})"))
    return lines


def both(folder: Path, seed: int) -> list[str]:
    """Heads and channels together, and with rounding behind."""
    rounded = "annotate(scheme='W4A16', group=8, symmetric=False), round_weights"
    pipelines = {
        "20 %, uniform": "prune(share=0.2)",
        "20 %, free": "prune(share=0.2, uniform=False)",
        "20 %, free, with biases": "prune(share=0.2, uniform=False, bias=True)",
        "20 %, free, then 4 bits in groups of 8 by GPTQ": f"prune(share=0.2, uniform=False), {rounded}",
    }
    return [HEAD.format("heads and channels")] + [line(folder, seed, name, text) for name, text in pipelines.items()]


def units(folder: Path, seed: int) -> list[str]:
    """Units other than channels and whole heads."""
    lines = [HEAD.format("units, fisher")]
    rows = {
        "50% of query heads": "share=0.5, what=['query_heads'], compensate=False",
        "50% of query heads, refitted": "share=0.5, what=['query_heads']",
        "25% of inputs": "share=0.25, what=['inputs'], compensate=False",
        "25% of inputs, refitted": "share=0.25, what=['inputs']",
        "25% of outputs": "share=0.25, what=['outputs']",
        "25% of outputs, with means": "share=0.25, what=['outputs'], bias=True",
    }
    lines += [line(folder, seed, name, f"prune({options})") for name, options in rows.items()]
    for name, options in {
        "one attention of six": "share=0.1667, what=['blocks'], ignore=['re:.*mlp']",
        "one MLP of six": "share=0.1667, what=['blocks'], ignore=['re:.*self_attn']",
        "one layer of six": "share=0.1667, what=['layers']",
    }.items():
        for criterion in ("fisher", "wanda", "measured"):
            lines.append(line(folder, seed, f"{name}, {criterion}", f"prune({options}, criterion='{criterion}')"))
    return lines


def masks(folder: Path, seed: int) -> list[str]:
    """Learned masks as a criterion."""
    lines = [HEAD.format("MLP channels, learned masks (150 steps), refitted")]
    for share in SHARES["mlp"]:
        for uniform in (True, False):
            name = f"{share:.0%}, {'the same width in all layers' if uniform else 'each layer its own'}"
            options = f"share={share}, what=['mlp'], criterion='masks', steps=150, rate=0.01, uniform={uniform}"
            lines.append(line(folder, seed, name, f"prune({options})"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder: Path = options.bench
    torch.set_num_threads(1)
    sections: dict[str, tuple[str, Callable[[], list[str]]]] = {
        what: (f"Criteria, {whole}", partial(criteria, folder, options.seed, what)) for what, whole in WHOLE.items()
    }
    sections["free"] = ("Widths", partial(free, folder, options.seed))
    sections["both"] = ("Heads and channels", partial(both, folder, options.seed))
    sections["units"] = ("Query heads, dims of the residual stream, branches and layers", partial(units, folder, options.seed))
    sections["masks"] = ("Learned masks", partial(masks, folder, options.seed))
    head = (
        f"# Pruning\n\n`python -m tools.bench_prune {folder}`, calibration seed {options.seed}, one thread, beside other work; "
        f"full precision {FULL[0]} / {FULL[1]}.\n"
    )
    report(head, sections, options.sections or SECTIONS, options.out)


if __name__ == "__main__":
    main()
