"""Perplexity of the weight-only and W8A8 presets on the bench model, beside the peers' figures for the same protocol.

python -m tools.bench_accuracy ../shared/bench --out tools/results/accuracy.md
"""

import argparse
import time
from pathlib import Path

import passes
from tools import bench_model

# Pipeline: the best GPTQ figures of any peer (WikiText-2, news); for W8A8 the full-precision figures.
ROWS = {
    "w4a16": (46.97, 45.13),
    "w4a16(rounding='nearest')": None,
    "w3a16": (47.55, 45.79),
    "w3a16(rounding='nearest')": None,
    "w2a16": (50.73, 51.68),
    "w2a16(rounding='nearest')": None,
    "w8a16": None,
    "w8a8": (46.87, 44.93),
    "w8a8(dynamic=False)": (46.87, 44.93),
    "w4a8": None,
    "w4a4": (52.81, 51.27),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="pipelines, instead of all rows")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = bench_model.load(options.bench, options.seed)
    full = bench.perplexities(bench.model)
    lines = [
        "| pipeline | counted bits | WikiText-2 | news | best peer with GPTQ | relative to it | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| none (full precision) | | {full[0]:.3f} | {full[1]:.3f} | | | |",
    ]
    for pipeline in options.only or ROWS:
        started = time.perf_counter()
        compiled = passes.compile(bench.model, pipeline, bench.calibration, seed=options.seed)
        seconds = time.perf_counter() - started
        ours = bench.perplexities(compiled)
        peer = ROWS.get(pipeline)
        beside = f"{peer[0]:.2f} / {peer[1]:.2f}" if peer else ""
        relative = " / ".join(f"{100 * (mine / theirs - 1):+.2f} %" for mine, theirs in zip(ours, peer, strict=True)) if peer else ""
        lines.append(
            f"| `{pipeline}` | {compiled.effective_bits:.3f} | {ours[0]:.3f} | {ours[1]:.3f} | {beside} | {relative} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        head = f"# Accuracy\n\nCalibration seed {options.seed}; for W8A8 the last two columns compare with full precision.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
