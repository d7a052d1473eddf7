"""Mixed widths on the bench model: perplexity over budgets beside the peers, global against layer-local losses, predicted against measured.

    python -m tools.bench_bits ../shared/bench --out tools/results/bits.md

Every linear but the head, weight-only. Nothing is chosen on the test texts. Peers' figures are those of the bench folder, measured with the
same protocol; a row's peers have the same or more counted bits. Seconds are whole compiles, with the prediction of losses in the first
row of each rounding (`file` keeps it).
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

import passes
from ir import edit
from ir.sites import layers
from passes.costs import load as load_costs
from passes.measure import divergence
from tools import bench_model
from tools.bench_model import BenchModel

# Counted bits, name, WikiText-2, news.
PEERS = (
    (2.05, "GPTQ per channel", 52.82, 56.56),
    (2.28, "AutoRound", 49.06, 48.99),
    (2.744, "AutoRound AutoScheme", 47.76, 46.86),
    (3.244, "AutoRound AutoScheme", 47.29, 45.79),
    (4.31, "AutoRound", 46.87, 45.20),
    (4.31, "GPTQ asymmetric", 46.98, 45.13),
)
LOCAL = (
    "canonicalize, untie, fold_norm, center_norm, annotate(scheme='W4A16', group=64, symmetric=False), rotate_channels(where=['R1', 'R2'])"
)
KNOWN = {"loss": "model", "rounding": "nearest", "tokens": 8192, "seed": 0}  # how `correlation` predicts
DRAWS, WIDTHS = 30, (2, 3, 4, 8)


def budgets(bench: BenchModel, wanted: list[float], options: str, folder: Path) -> list[str]:
    """One row a budget, with the peers that have the same bits."""
    full = bench.perplexities(bench.model)
    lines = ["| budget | counted bits | WikiText-2 | news | excess | peers at these bits | seconds |", "|---|---|---|---|---|---|---|"]
    for bits in wanted:
        started = time.perf_counter()
        made = passes.compile(bench.model, f"mixed(bits={bits}, {options}, file={str(folder / 'costs.json')!r})", bench.calibration)
        seconds = time.perf_counter() - started
        wiki, news = bench.perplexities(made)
        excess = " / ".join(f"{math.log(mine / whole):.4f}" for mine, whole in zip((wiki, news), full, strict=True))
        peers = "; ".join(f"{name} {a} / {b}" for at, name, a, b in PEERS if abs(at - bits) < 0.07)
        lines.append(f"| {bits} | {made.effective_bits:.3f} | {wiki:.2f} | {news:.2f} | {excess} | {peers} | {seconds:.0f} |")
        print(lines[-1], *(note for note in made.report().notes if "assign" in note), sep="\n", flush=True)
    return lines


def losses(bench: BenchModel, bits: float) -> list[str]:
    """The same budget and rounding, with widths chosen by the model's loss, by the layers' own errors, and not at all."""
    choices = {
        "the model's predicted loss": f"assign_bits(bits={bits}, groups=(64, -1))",
        "each layer's own relative error": f"assign_bits(bits={bits}, groups=(64, -1), loss='layer')",
    }
    lines = ["| widths chosen by | counted bits | WikiText-2 | news |", "|---|---|---|---|"]
    for name, choice in choices.items():
        made = passes.compile(bench.model, f"{LOCAL}, {choice}, round_weights(propagation=0.25)", bench.calibration)
        wiki, news = bench.perplexities(made)
        lines.append(f"| {name} | {made.effective_bits:.3f} | {wiki:.2f} | {news:.2f} |")
        print(lines[-1], flush=True)
    return lines


def correlation(bench: BenchModel, seed: int = 1) -> list[str]:
    """Predicted against measured divergence over random allocations, rounded to nearest, on windows that were not calibrated on."""
    windows: Tensor = bench.protocol.calibration_windows(seed)[:24]
    generator = torch.Generator().manual_seed(0)
    predicted, measured = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "costs.json")
        known = f"assign_bits(bits=8.5, widths={WIDTHS}, rounding='nearest', file={file!r})"
        start = passes.compile(bench.model, f"{LOCAL}, {known}", bench.calibration).graph
        costs = load_costs(Path(file), KNOWN)
        for _ in range(DRAWS):
            gm, total = edit.copied(start), 0.0
            spread = torch.rand(2, generator=generator)
            for layer in layers(gm):
                encoding = layer.site("weight").encoding
                if encoding is None:
                    continue
                draw = int((spread.min() + torch.rand(1, generator=generator) * (spread.max() - spread.min())) * len(WIDTHS))
                mark = str(encoding).replace(f"u{encoding.bits}", f"u{WIDTHS[min(draw, len(WIDTHS) - 1)]}")
                layer.site("weight").annotate(type(encoding).parse(mark))
                total += costs[layer.path, mark]
            made = passes.compile(gm, "round_weights(method='nearest')")
            predicted.append(total)
            measured.append(divergence(made, bench.model, windows))
    rank = float(spearmanr(predicted, measured).statistic)
    lines = [f"{DRAWS} random allocations of {WIDTHS} to all linears: rank correlation {rank:.3f}.", ""]
    lines += ["| predicted, nats a token | measured |", "|---|---|"]
    lines += [f"| {a:.4f} | {b:.4f} |" for a, b in sorted(zip(predicted, measured, strict=True))]
    print(lines[0], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--bits", type=float, nargs="*", default=[2.05, 2.28, 2.5, 2.744, 3.244, 4.25])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--own-text", action=argparse.BooleanOptionalAction, default=True, help="calibrate on the model's own text too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = bench_model.load(options.bench, options.seed)
    made = f"steps={options.steps}, own_text={options.own_text}"
    text = [f"# Mixed widths\n\n`python -m tools.bench_bits {options.bench}`, calibration seed {options.seed}, `{made}`.\n"]
    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "Predicted against measured": lambda: correlation(bench),
            "Budgets (full precision 46.87 / 44.93)": lambda: budgets(bench, options.bits, made, Path(folder)),
            "Global against local, rounded by GPTQ": lambda: losses(bench, 2.5),
        }
        for title, run in sections.items():
            text += [f"## {title}\n", *run(), ""]
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
