"""Mixed widths on the bench model: perplexity over budgets beside the peers, with times and memory.

    python -m tools.bench_bits ../shared/bench --out tools/results/bits.md

Every linear but the head. Nothing is chosen on the test texts. Peers' figures are those of the bench folder, measured with the same
protocol; `tools/peers/autoround.py` measures one of them beside, in an environment of its own. Seconds are whole compiles, with everything
that `mixed` does; MB are the process's greatest resident size, of which imports and the loaded model take 830.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from torch.fx import GraphModule

import passes
from ir import edit
from tools import bench_model
from tools.bench_model import FULL, excess, report

# Counted bits, name, WikiText-2, news.
PEERS = (
    (2.05, "GPTQ per channel", 52.82, 56.56),
    (2.28, "AutoRound", 49.06, 48.99),
    (2.744, "AutoRound AutoScheme", 47.76, 46.86),
    (3.244, "AutoRound AutoScheme", 47.29, 45.79),
    (3.30, "AutoRound", 47.24, 45.80),
    (4.25, "GPTQ symmetric", 46.97, 45.16),
    (4.31, "AutoRound", 46.87, 45.20),
    (4.31, "GPTQ asymmetric", 46.98, 45.13),
)
NARROW = "widths=(1, 2, 3, 4)"
BUDGETS = {1.6: NARROW, 2.0: NARROW} | dict.fromkeys((2.28, 2.5, 2.744, 3.0, 3.244, 3.3, 4.25, 4.31), "")
UNIFORM = "canonicalize, annotate(scheme='W{}A16', group={}, symmetric=False), round_weights"
OPENED = "canonicalize, untie, fold_norm, center_norm"
LOCAL = f"{OPENED}, annotate(scheme='W4A16', group=64, symmetric=False), rotate_channels(where=['R1', 'R2'])"
LABELS = "labels=0.03"
SECTIONS = ("budgets", "labels", "uniform", "losses", "masks", "low", "seeds")
HEAD = "| pipeline | counted bits | WikiText-2 | news | excess, nats | seconds | MB |\n|---|---|---|---|---|---|---|"


def row(folder: Path, seed: int, pipeline: str) -> tuple[float, float, float, float, float]:
    """Counted bits, both perplexities, seconds and MB of one compile, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (folder, seed, pipeline))


def _measured(folder: Path, seed: int, pipeline: str) -> tuple[float, float, float, float, float]:
    bench = bench_model.load(folder, seed)
    started = time.perf_counter()
    made = passes.compile(bench.model, pipeline, bench.calibration)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wiki, news = bench.perplexities(made)
    return made.effective_bits, wiki, news, seconds, used


def line(folder: Path, seed: int, pipeline: str, name: str = "") -> str:
    bits, wiki, news, seconds, used = row(folder, seed, pipeline)
    text = f"| {name or f'`{pipeline}`'} | {bits:.3f} | {wiki:.2f} | {news:.2f} | {excess((wiki, news))} | {seconds:.0f} | {used:.0f} |"
    print(text, flush=True)
    return text


def budgets(folder: Path, seed: int, options: str, chosen: list[float]) -> list[str]:
    """One row a budget, with the peers that have at most as many bits more as make no difference."""
    lines = [HEAD]
    for bits in chosen:
        mixed = ", ".join(filter(None, (f"bits={bits}", BUDGETS[bits], options)))
        lines.append(line(folder, seed, f"mixed({mixed})"))
        for at, name, wiki, news in PEERS:
            if abs(at - bits) < 0.065:
                lines.append(f"| peer: {name} | {at} | {wiki} | {news} | {excess((wiki, news))} | | |")
    return lines


def uniform(folder: Path, seed: int) -> list[str]:
    """One width everywhere, by GPTQ."""
    kinds = ((2, 64), (2, -1), (3, 64), (4, 64))
    return [HEAD] + [line(folder, seed, UNIFORM.format(*kind), "GPTQ, {} bits, group {}".format(*kind)) for kind in kinds]


def losses(folder: Path, seed: int, bits: float) -> list[str]:
    """The same budget and rounding, with widths chosen by the model's loss, and by the layers' own errors."""
    choices = {
        "the model's predicted loss": f"assign_bits(bits={bits}, groups=(64, -1))",
        "each layer's own relative error": f"assign_bits(bits={bits}, groups=(64, -1), loss='layer')",
    }
    return [HEAD.replace("pipeline", "widths chosen by")] + [
        line(folder, seed, f"{LOCAL}, {choice}, round_weights(propagation=0.25)", name) for name, choice in choices.items()
    ]


def masks(folder: Path, seed: int, steps: int) -> list[str]:
    """The published system's steps (2606.07819), with its masks and with channels chosen by what they are; groups of 64."""
    bench = bench_model.load(folder, seed)
    marked = f"{OPENED}, annotate(scheme='{{}}', group=64)"
    learned = f"{marked.format('W4A4')}, learn_masks(steps={steps}, rate=0.003, rows=2, {{}})"
    wide = "split_channels(high='W8A8', share={}, by='activation', multiple={})"
    nearest, gptq = "round_weights(method='nearest'), quantize", "quantize(weights=False), round_weights"
    rounded = "learn_rounding(steps=100), quantize"
    rows = {  # what is prepared, and how it is finished: rows that share the former share its work
        "W4A4 to nearest": (marked.format("W4A4"), nearest),
        "+ 12.5 % of channels in 8 bits, by learned masks": (learned.format("order=False"), nearest),
        "+ channels sorted": (learned.format("order=True"), nearest),
        "+ GPTQ": (learned.format("order=True"), gptq),
        "masks by cross entropy, as published; sorted, GPTQ": (learned.format("loss='cross_entropy'"), gptq),
        "12.5 % by mean square; sorted, GPTQ": (f"{marked.format('W4A4')}, {wide.format(0.125, 16)}", gptq),
        "12.5 % by mean square; sorted, learned rounding": (f"{marked.format('W4A4')}, {wide.format(0.125, 16)}", rounded),
        "W3A3 to nearest": (marked.format("W3A3"), nearest),
        "3 % of channels in 8 bits, by mean square; GPTQ": (f"{marked.format('W3A3')}, {wide.format(0.03, 8)}", gptq),
        "3 % of channels in 8 bits, by mean square; learned rounding": (f"{marked.format('W3A3')}, {wide.format(0.03, 8)}", rounded),
    }
    lines = ["| W4A4/W8A8 and W3.2A3.2 | counted bits | WikiText-2 | news |", "|---|---|---|---|"]
    known: dict[str, GraphModule] = {}
    for name, (before, after) in rows.items():
        if before not in known:
            known = {before: passes.compile(bench.model, before, bench.calibration).graph}
        made = passes.compile(edit.copied(known[before]), after, bench.calibration)
        wiki, news = bench.perplexities(made)
        lines.append(f"| {name} | {made.effective_bits:.3f} | {wiki:.2f} | {news:.2f} |")
        print(lines[-1], flush=True)
    return lines


def low(folder: Path, seed: int) -> list[str]:
    """1.6 bits the published way: a part of the channels in 4 bits, the others in 1."""
    marked = f"{OPENED}, annotate(scheme='W1A16'), split_channels(high='W4A16', share=0.16, by='activation', order=False)"
    names = {
        "1 and 4 bits to nearest": f"{marked}, round_weights(method='nearest')",
        "1 and 4 bits, GPTQ": f"{marked}, round_weights",
        "1 and 4 bits, learned rounding": f"{marked}, learn_rounding",
    }
    return [HEAD.replace("pipeline", "1.6 bits")] + [line(folder, seed, text, name) for name, text in names.items()]


def seeds(folder: Path, options: str, count: int = 3) -> list[str]:
    """The spread over calibration seeds at 2.28 bits."""
    found = [row(folder, seed, f"mixed(bits=2.28, {options})") for seed in range(count)]
    lines = ["| calibration seed | WikiText-2 | news |", "|---|---|---|"]
    lines += [f"| {seed} | {wiki:.2f} | {news:.2f} |" for seed, (_, wiki, news, _, _) in enumerate(found)]
    spread = " | ".join(f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}" for own in zip(*(r[1:3] for r in found), strict=True))
    return [*lines, f"| mean ± standard deviation | {spread} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--options", default="steps=100", help="of mixed")
    parser.add_argument("--mask-steps", type=int, default=200)
    parser.add_argument("--budgets", nargs="*", type=float, choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--sections", nargs="*", choices=SECTIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder: Path = options.bench
    head = (
        f"# Mixed widths\n\n`python -m tools.bench_bits {folder}`, calibration seed {options.seed}, full precision {FULL[0]} / {FULL[1]}.\n"
    )
    sections: dict[str, tuple[str, Callable[[], list[str]]]] = {
        "budgets": ("Budgets", lambda: budgets(folder, options.seed, options.options, options.budgets)),
        "labels": (f"Budgets, {LABELS}", lambda: budgets(folder, options.seed, f"{options.options}, {LABELS}", options.budgets)),
        "uniform": ("One width everywhere", lambda: uniform(folder, options.seed)),
        "losses": ("Global against local, rounded by GPTQ", lambda: losses(folder, options.seed, 2.5)),
        "masks": ("Channels within linears, activations", lambda: masks(folder, options.seed, options.mask_steps)),
        "low": ("Channels within linears, 1.6 bits", lambda: low(folder, options.seed)),
        "seeds": ("Spread over seeds", lambda: seeds(folder, options.options)),
    }
    report(head, sections, options.sections or SECTIONS, options.out)


if __name__ == "__main__":
    main()
