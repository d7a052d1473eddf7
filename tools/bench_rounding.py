"""Every rounding method on the bench model at uniform widths: perplexities and seconds.

    python -m tools.bench_rounding ../shared/bench --out tools/results/rounding.md

Every linear but the head, weight-only, in groups of 64, after the rotations R1 and R2. Nothing is chosen on the test texts. Seconds are
those of `round_weights` alone, with the gathering of what the method needs. Rows that `--out` already has are kept.
"""

import argparse
from pathlib import Path

import torch
from torch.fx import GraphModule

import passes
from ir import edit
from tools import bench_model
from tools.bench_model import BenchModel

PREPARED = (
    "canonicalize, untie, fold_norm, center_norm, annotate(scheme='W{bits}A16', group=64, symmetric={symmetric}), "
    "rotate_channels(where=['R1', 'R2'])"
)
ROWS = (
    "method='nearest'",
    "method='gptq'",
    "method='gptq', propagation=0.25",
    "method='exact_scales'",
    "method='gptaq'",
    "method='gptaq', propagation=0.25",
    "method='qronos'",
    "method='qronos', propagation=0.25",
    "method='guided'",
    "method='guided', propagation=0.25",
    "method='yaqa'",
    "method='yaqa', propagation=0.25",
)
# Width, symmetric, options.
CASES = {
    2: [(False, options) for options in ROWS] + [(True, "method='nearest'"), (True, "method='ternary'"), (True, "method='gptq'")],
    3: [(False, options) for options in ROWS],
    1: [(True, f"method={method!r}") for method in ("nearest", "exact_scales", "gptq")],
}
HEAD = ["| weights | `round_weights(...)` | counted bits | WikiText-2 | news | seconds |", "|---|---|---|---|---|---|"]


def row(bench: BenchModel, start: GraphModule, options: str) -> str:
    """Round what is prepared, and measure."""
    made = passes.compile(edit.copied(start), f"round_weights({options})", bench.calibration)
    (seconds,) = (record.seconds for record in made.trace if record.text.startswith("round_weights"))
    wiki, news = bench.perplexities(made)
    return f"| {made.effective_bits:.3f} | {wiki:.2f} | {news:.2f} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=list(CASES))
    parser.add_argument("--methods", nargs="*", default=[""], help="only rows whose options contain one of these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = bench_model.load(given.bench, given.seed)
    command = f"`python -m tools.bench_rounding {given.bench}`, calibration seed {given.seed}"
    title = f"# Rounding methods\n\n{command}, full precision 46.87 / 44.93.\n"
    kept = given.out.read_text(encoding="utf-8").splitlines() if given.out.exists() else []
    lines = [*HEAD, *(line for line in kept if line.startswith("| W"))]
    for bits in given.bits:
        starts: dict[bool, GraphModule] = {}
        for symmetric, options in CASES[bits]:
            name = f"| W{bits}{' symmetric' if symmetric else ''} | `{options}` "
            if any(line.startswith(name) for line in lines) or not any(wanted in options for wanted in given.methods):
                continue
            if symmetric not in starts:
                starts[symmetric] = passes.compile(bench.model, PREPARED.format(bits=bits, symmetric=symmetric)).graph
            lines.append(name + row(bench, starts[symmetric], options))
            print(lines[-1], flush=True)
            given.out.write_text("\n".join([title, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
