"""Pruning and mixed widths as one search on the bench model: perplexity over the memory of the linears as a share of FP16.

    python -m tools.bench_joint ../shared/bench --out tools/results/joint.md

Every way gets the same calibration data, of which the model wrote a part itself, the same widths and groups, rounding by GPTQ, and every
budget that it can meet. Nothing is chosen on the test texts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

import passes
from ir import edit
from ir.errors import OptionError
from ir.schemes import FLOAT
from ir.sites import chosen
from passes.base import Context
from passes.data.calibration import flat_batches
from passes.pipeline import Pipeline
from tools import bench_model
from tools.bench_model import FULL, excess, report

BUDGETS = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25)
OPENED = "canonicalize, untie, fold_norm, center_norm, rotate_channels(where=['R1', 'R2'])"
MARKED = "annotate(scheme='W4A16', group=64, symmetric=False)"
SEARCH = "widths=(1, 2, 3, 4, 8), groups=(64, -1)"
ROUNDED = "round_weights(propagation=0.25)"
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
LEARNED = "mixed(memory={}, prune={}, widths=(1, 2, 3, 4), steps=100)"
PAIRS = ((1, 4), (2, 4))  # widths that masks choose between, in whole columns
MASKS = "fit_masks(high='W{}A16', memory={}, steps=400, rows=2, rate=0.003)"
SECTIONS = ("quantize", "fixed", "pruned", "joint", "masks", "learned")
HEAD = "| {} | memory | weights kept | WikiText-2 | news | excess, nats | predicted, nats |\n|---|---|---|---|---|---|---|"


class Bench:
    """The bench model, opened, and calibration data that the model wrote half of."""

    def __init__(self, folder: Path, seed: int, budgets: list[float], files: Path) -> None:
        self.bench, self.budgets, self.files = bench_model.load(folder, seed), budgets, files
        self.opened: GraphModule = passes.compile(self.bench.model, OPENED).graph

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Windows of the calibration text, and of the model's own."""
        gm = edit.copied(self.opened)
        ctx = Context(flat_batches(gm, self.bench.calibration), gm.meta["example"])
        Pipeline.parse("sample_text").execute(gm, ctx)
        return [batch[0] for batch in ctx.calibration]

    def prepared(self, pipeline: str) -> GraphModule:
        """The opened model after more passes."""
        return passes.compile(edit.copied(self.opened), pipeline, self.calibration).graph

    def rows(self, start: GraphModule, name: str, search: str) -> list[str]:
        """A row for each budget that can be met; `search` has a place for it, in bits for each weight that `start` has."""
        lines, whole = [], weights_in(self.opened)
        file = str(self.files / f"{abs(hash(name))}.json")
        for budget in self.budgets:
            bits = FLOAT * budget * whole / weights_in(start)
            text = f"{search.format(bits)[:-1]}, {SEARCH}, file={file!r}), {ROUNDED}"
            try:
                made = passes.compile(edit.copied(start), text, self.calibration)
            except OptionError as error:
                lines.append(f"| {name} | {budget} | | | | none: {error.remedy.split(',')[0]} | |")
            else:
                lines.append(self.row(name, made, whole))
                for tried in made.report().tables.get("plans", []):
                    print(tried, flush=True)
            print(lines[-1], flush=True)
        return lines

    def row(self, name: str, made: passes.Compiled, whole: int) -> str:
        found = self.bench.perplexities(made)
        coverage = made.report().coverage
        widths = made.report().tables.get("widths")
        cost = f"{sum(row.get('nats a token', 0.0) for row in widths):.4f}" if widths else ""
        wiki, news = found
        memory, kept = coverage.bits / (FLOAT * whole), coverage.elements / whole
        return f"| {name} | {memory:.4f} | {kept:.1%} | {wiki:.2f} | {news:.2f} | {excess(found, 3)} | {cost} |"


def weights_in(gm: GraphModule) -> int:
    """Weights of all linears but the head."""
    return sum(edit.value(layer.weight).numel() for layer in chosen(gm))


def quantize(bench: Bench) -> list[str]:
    """Widths alone."""
    return [HEAD.format("widths"), *bench.rows(bench.prepared(MARKED), "widths alone", "assign_bits(bits={})")]


def fixed(bench: Bench) -> list[str]:
    """One share kept of all units, widths by the search."""
    start = bench.prepared(MARKED)
    lines = [HEAD.format("share kept")]
    for share in (0.75, 0.5):
        lines += bench.rows(start, f"{share:.0%} of all units", f"fit_budget(bits={{}}, shares=({share},), measure=0)")
    return lines


def pruned(bench: Bench) -> list[str]:
    """Pruned and refitted first; then widths are searched for what is left."""
    lines = [HEAD.format("pruned, then")]
    for share in (0.25, 0.5):
        start = bench.prepared(f"prune(share={share}), {MARKED}")
        lines += bench.rows(start, f"{share:.0%} pruned, then widths", "assign_bits(bits={})")
    return lines


def joint(bench: Bench) -> list[str]:
    """Both in one search; the plans are measured behind the rounding that follows."""
    start = bench.prepared(MARKED)
    return [HEAD.format("joint"), *bench.rows(start, "joint", f"fit_budget(bits={{}}, shares={SHARES}, measure=2048, finish={ROUNDED!r})")]


def masks(bench: Bench) -> list[str]:
    """What goes and what is wider by learned masks, on the model as it is: rotations would mix the dims that they drop."""
    whole, lines = weights_in(bench.opened), [HEAD.format("masks")]
    for low, high in PAIRS:
        for budget in bench.budgets:
            marked = f"canonicalize, untie, annotate(scheme='W{low}A16', symmetric={low == 1})"
            name = f"{low} and {high} bits"
            try:
                made = passes.compile(bench.bench.model, f"{marked}, {MASKS.format(high, budget)}, {ROUNDED}", bench.calibration)
            except OptionError as error:
                lines.append(f"| {name} | {budget} | | | | none: {error.remedy.split(',')[0]} | |")
            else:
                lines.append(bench.row(name, made, whole))
            print(lines[-1], flush=True)
    return lines


def learned(bench: Bench) -> list[str]:
    """The preset, with learned rounding, with dropping and without."""
    whole, lines = weights_in(bench.opened), [HEAD.format("dropping")]
    for budget in bench.budgets:
        for prune in (True, False):
            started = time.process_time()
            try:
                made = passes.compile(bench.bench.model, LEARNED.format(budget, prune), bench.bench.calibration)
            except OptionError as error:
                lines.append(f"| {prune} | {budget} | | | | none: {error.remedy.split(',')[0]} | |")
            else:
                seconds = time.process_time() - started
                lines.append(bench.row(f"{prune}, {seconds:.0f} seconds of the processor", made, whole))
                for tried in made.report().tables.get("plans", []):
                    print(tried, flush=True)
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS)
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = (
        f"# Pruning and widths in one search\n\n`python -m tools.bench_joint {options.bench}`, calibration seed {options.seed}; "
        f"full precision {FULL[0]} / {FULL[1]}. Memory is that of all linears but the head, over their size in FP16.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.bench, options.seed, options.budgets, Path(folder))
        sections: dict[str, tuple[str, Callable[[], list[str]]]] = {
            "quantize": ("Widths alone", partial(quantize, bench)),
            "fixed": ("Fixed sparsity", partial(fixed, bench)),
            "pruned": ("Pruned, then widths", partial(pruned, bench)),
            "joint": ("Both in one search", partial(joint, bench)),
            "masks": ("Both by learned masks", partial(masks, bench)),
            "learned": ("With learned rounding", partial(learned, bench)),
        }
        report(head, sections, options.sections or SECTIONS, options.out)


if __name__ == "__main__":
    main()
