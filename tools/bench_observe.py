"""The observe pass: memory against the length of the calibration data, and ranks of its quantiles against exact ones.

    python tools/bench_observe.py --out tools/results/observe.md

Memory: an embedding of 4096 channels and a linear that reads it, observed over batches of 2048 tokens, each run in a process of its own.
Ranks: 256 × 2048 samples of known distributions in 8 channels; the error of a quantile is the share of the samples that lie strictly
between the answer and the exact quantile, so that ties count for nothing.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ir.capture import capture
from ir.statistics import TensorStatistics
from passes.base import Context
from passes.observe import Observe

HIDDEN, LENGTH, FEW, MANY = 4096, 2048, 8, 256
CHANNELS, VOCABULARY = 8, 1024
QUANTILES = (0.5, 0.9, 0.99, 0.994, 0.999, 0.9995)
MEMORY_LIMIT, RANK_LIMIT = 1.2, 1e-3


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(batches: int) -> None:
    """Observe so many batches and print the peak memory and the seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, 16, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.pow_(3)
    gm = capture(model, args=(torch.zeros(2, 3, dtype=torch.long),))
    ctx = Context(calibration=[[torch.randint(VOCABULARY, (1, LENGTH))] for _ in range(batches)])
    before, started = peak(), time.process_time()
    Observe().run(gm, ctx)
    (found,) = ctx.statistics.values()
    assert found.count == batches * LENGTH
    kept = sum(tensor.nbytes for tensor in found.tensors().values())
    print(json.dumps({"before": before, "peak": peak(), "kept": kept, "seconds": time.process_time() - started}))


def memory() -> tuple[str, bool]:
    lines = ["| tokens | before, MB | peak, MB | more, MB | statistics, MB | processor seconds |", "|---|---|---|---|---|---|"]
    rows = []
    for batches in (FEW, MANY):
        command = [sys.executable, __file__, "--batches", str(batches)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        more = row["peak"] - row["before"]
        cells = [f"{batches} × {LENGTH}", *(f"{part / 1e6:.0f}" for part in (row["before"], row["peak"], more, row["kept"]))]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
        rows.append((row["peak"], more))
        print(lines[-1], flush=True)
    ratios = [many / few for few, many in zip(*rows, strict=True)]
    holds = ratios[0] < MEMORY_LIMIT
    verdict = f"Peak × {ratios[0]:.2f}, without what the process held before × {ratios[1]:.2f}; the claim is under {MEMORY_LIMIT}"
    return "\n".join([*lines, "", f"{verdict}: {'holds' if holds else 'FAILS'}."]), holds


def samples() -> Iterator[tuple[str, Tensor]]:
    """Named samples `[MANY · LENGTH, CHANNELS]`."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(MANY * LENGTH, CHANNELS, generator=generator)

    def outliers(every: int, factor: float) -> Tensor:
        x = normal()
        x[::every] *= factor
        return x

    yield "Gaussian", normal()
    yield "Student t, 3 degrees", normal() / ((normal().square() + normal().square() + normal().square()) / 3).sqrt()
    yield "Student t, 2 degrees", normal() / ((normal().square() + normal().square()) / 2).sqrt()
    yield "log-normal, σ = 1", normal().exp()
    yield "log-normal, σ = 2", (2 * normal()).exp()
    yield "silu(z₁) · z₂", nn.functional.silu(normal()) * normal()
    yield "Gaussian, one token in 128 × 2000", outliers(128, 2e3)
    yield "Gaussian, one token in 2048 × 2000", outliers(2048, 2e3)
    yield "Gaussian, one token in 2048 × 100 000", outliers(2048, 1e5)
    yield "Gaussian, half of it zero", normal().relu()
    yield "Gaussian in bfloat16", normal().bfloat16().float()


def rank_errors(x: Tensor) -> list[float]:
    """The greatest rank error over the channels, for every quantile."""
    kept = TensorStatistics.empty(CHANNELS)
    for batch in x.split(LENGTH):
        kept.update(batch)
    assert kept.sketch is not None
    magnitude = x.abs()
    ordered = magnitude.sort(0).values
    errors = []
    for q in QUANTILES:
        answer, exact = kept.sketch.quantile(q), ordered[int(q * (len(x) - 1))]
        low, high = torch.minimum(answer, exact), torch.maximum(answer, exact)
        errors.append(float(((magnitude > low) & (magnitude < high)).double().mean(0).amax()))
    return errors


def ranks() -> tuple[str, bool]:
    lines = ["| rank error, % | " + " | ".join(f"q = {q}" for q in QUANTILES) + " |", "|---" * (1 + len(QUANTILES)) + "|"]
    worst = 0.0
    for label, x in samples():
        errors = rank_errors(x)
        worst = max(worst, *errors)
        lines.append(f"| {label} | " + " | ".join(f"{100 * error:.4f}" for error in errors) + " |")
        print(lines[-1], flush=True)
    holds = worst < RANK_LIMIT
    verdict = f"Greatest {100 * worst:.3f} %; the claim is under {100 * RANK_LIMIT:.1f} %: {'holds' if holds else 'FAILS'}."
    return "\n".join([*lines, "", verdict]), holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, help="observe so many batches in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.batches:
        one(options.batches)
        return
    torch.set_num_threads(1)
    (exact, first), (lean, second) = ranks(), memory()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        parts = ["# The observe pass", "## Memory", f"Hidden size {HIDDEN}, one linear.", lean, "## Quantiles of |x|"]
        parts += [f"{MANY * LENGTH} tokens; the greatest error of {CHANNELS} channels.", exact]
        options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if not (first and second):
        sys.exit("a claim does not hold")


if __name__ == "__main__":
    main()
