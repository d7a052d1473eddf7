"""W4A4 and W3A3 on the bench model, step by step: rotations, smoothing, learning, rounding.

    python -m tools.bench_transforms ../shared/bench --out tools/results/transforms.md

Every linear but the head, weights per output channel, activations per token. Nothing is chosen on the test texts.
"""

import argparse
import time
from pathlib import Path

import passes
from tools import bench_model

OPENED = "canonicalize, untie, fold_norm, center_norm"
CLIPPED = "clip_activations, quantize"
GPTQ = "quantize(weights=False), round_weights(propagation=0.25)"
MLP = "where=['mlp']"

# What is done, with {} for the scheme.
STEPS = {
    "to nearest": "canonicalize, annotate(scheme='{}'), quantize",
    "GPTQ": "canonicalize, annotate(scheme='{}'), round_weights, quantize",
    "clips, to nearest": f"canonicalize, annotate(scheme='{{}}'), {CLIPPED}",
    "+ smoothing, maxima": f"{OPENED}, annotate(scheme='{{}}'), smooth_channels, {CLIPPED}",
    "+ R1 R2": f"{OPENED}, annotate(scheme='{{}}'), rotate_channels(where=['R1', 'R2']), {CLIPPED}",
    "+ R1 R2 R4": f"{OPENED}, annotate(scheme='{{}}'), rotate_channels, {CLIPPED}",
    "+ smoothing before R4, maxima": f"{OPENED}, annotate(scheme='{{}}'), smooth_channels({MLP}), rotate_channels, {CLIPPED}",
    "+ smoothing before R4, quantiles": (
        f"{OPENED}, annotate(scheme='{{}}'), smooth_channels(search=True, rotated=True, {MLP}), rotate_channels, {CLIPPED}"
    ),
    "+ block transforms instead": (
        f"{OPENED}, annotate(scheme='{{}}'), rotate_channels(where=['R1']), balance_channels(online=True), {CLIPPED}"
    ),
    "+ learned scales and clips instead": (
        f"{OPENED}, annotate(scheme='{{}}'), rotate_channels(where=['R1', 'R2']), learn, rotate_channels(where=['R4']), quantize"
    ),
    "rotations, GPTQ": "{}(transform='rotate')",
    "quantiles, GPTQ": "{}(transform='quantile')",
    "block transforms, GPTQ": "{}(transform='balance')",
    "learned, GPTQ": "{}(transform='learned')",
}
PEERS = {"W4A4": "GPTQ 52.81 / 51.27, SmoothQuant + GPTQ 52.77 / 51.17, SpinQuant R1 R2 + GPTQ 53.04 / 51.01", "W3A3": "GPTQ 74.04 / 76.08"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="*", default=list(PEERS))
    parser.add_argument("--only", nargs="*", default=list(STEPS), help="names of steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = bench_model.load(options.bench, options.seed)
    full = bench.perplexities(bench.model)
    text = [f"# W4A4 and W3A3, step by step\n\n`python -m tools.bench_transforms {options.bench}`, calibration seed {options.seed}.", ""]
    text.append(f"Full precision: {full[0]:.2f} / {full[1]:.2f}. Excess: of log perplexity over full precision. Seconds beside other work.")
    for scheme in options.schemes:
        text += ["", f"## {scheme} (peers: {PEERS.get(scheme, '')})", ""]
        text += ["| step | WikiText-2 | news | excess | seconds |", "|---|---|---|---|---|"]
        for name in options.only:
            line = STEPS[name].format(scheme.lower() if STEPS[name].startswith("{}") else scheme)
            started = time.perf_counter()
            compiled = passes.compile(bench.model, line, bench.calibration, seed=options.seed)
            seconds = time.perf_counter() - started
            found = bench.perplexities(compiled)
            text.append(f"| {name} | {found[0]:.2f} | {found[1]:.2f} | {bench_model.excess(found, whole=full)} | {seconds:.0f} |")
            print(scheme, text[-1], flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
