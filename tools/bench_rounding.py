"""Every rounding method on the bench model at uniform widths: perplexities and seconds.

    python -m tools.bench_rounding ../shared/bench --out tools/results/rounding.md

Every linear but the head, weight-only, asymmetric in groups of 64, after the rotations R1 and R2. Nothing is chosen on the test texts; KL
is that from the uncompressed model, on windows of the calibration text that are not calibrated on. Seconds are whole compiles.
"""

import argparse
import time
from pathlib import Path

import torch

import passes
from passes.measure import divergence
from tools import bench_model
from tools.bench_model import BenchModel

PREPARED = (
    "canonicalize, untie, fold_norm, center_norm, annotate(scheme='W{bits}A16', group={group}, symmetric={symmetric}), "
    "rotate_channels(where=['R1', 'R2'])"
)
# Options of `round_weights`, on any grid and on asymmetric ones of 2 and 3 bits.
ROWS = (
    "method='nearest'",
    "method='nearest', search=True",
    "method='exact_scales'",
    "sweeps=0",
    "",
    "propagation=0.25",
    "method='gptaq', sweeps=0",
    "method='gptaq'",
    "method='gptaq', propagation=0.25",
    "method='qronos', sweeps=0",
    "method='qronos'",
    "method='qronos', propagation=0.25",
    "method='guided'",
    "method='guided', propagation=0.25",
    "method='yaqa', sweeps=0",
    "method='yaqa'",
    "method='yaqa', propagation=0.25",
)
FEW_VALUES = {1: ("method='nearest'", "method='exact_scales'", ""), 2: ("method='nearest'", "method='ternary'", "")}  # symmetric
KL_WINDOWS = 24


def row(bench: BenchModel, prepared: str, options: str, name: str, seed: int) -> str:
    """Compile and measure."""
    started = time.perf_counter()
    made = passes.compile(bench.model, f"{prepared}, round_weights({options})", bench.calibration)
    seconds = time.perf_counter() - started
    wiki, news = bench.perplexities(made)
    calibrated = sum(map(len, bench.calibration))
    held = bench.protocol.calibration_windows(seed, calibrated + KL_WINDOWS)[calibrated:]
    kl = divergence(made, bench.model, held)
    line = f"| {name} | `round_weights({options})` | {made.effective_bits:.3f} | {wiki:.2f} | {news:.2f} | {kl:.4f} | {seconds:.0f} |"
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--only", default="", help="rows whose options contain this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = bench_model.load(options.bench, options.seed)
    cases = [(f"W{bits} g64", {"bits": bits, "group": 64, "symmetric": False}, given) for bits in options.bits for given in ROWS]
    cases += [
        (f"W{bits} g64 symmetric", {"bits": bits, "group": 64, "symmetric": True}, given)
        for bits in FEW_VALUES
        for given in FEW_VALUES[bits]
    ]
    lines = ["| weights | method | counted bits | WikiText-2 | news | KL | seconds |", "|---|---|---|---|---|---|---|"]
    for name, grid, given in cases:
        if options.only in given:
            lines.append(row(bench, PREPARED.format(**grid), given, name, options.seed))
            if options.out:
                head = f"# Rounding methods\n\n`python -m tools.bench_rounding {options.bench}`, calibration seed {options.seed}.\n\n"
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
