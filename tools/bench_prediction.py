"""Predicted against measured divergence over random allocations on the bench model, rounded to nearest.

    python -m tools.bench_prediction ../shared/bench --out tools/results/prediction.md

Measured on calibration windows that were not calibrated on.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

import passes
from ir import edit
from ir.sites import layers
from passes.budget.costs import load as load_costs
from passes.measure import divergence
from tools import bench_model
from tools.bench_bits import LOCAL
from tools.bench_model import BenchModel

DRAWS, WIDTHS = 30, (2, 3, 4, 8)
KNOWN = {"loss": "model", "rounding": "nearest", "tokens": 8192, "seed": 0}  # how costs are predicted here


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
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = correlation(bench_model.load(options.bench))
    if options.out:
        options.out.write_text(
            "\n".join(["# Predicted against measured\n", f"`python -m tools.bench_prediction {options.bench}`\n", *lines, ""])
        )


if __name__ == "__main__":
    main()
