"""One, two and four processes on the same work: whether they find the same, and how long they take.

    python -m tools.bench_ranks ../shared/bench --out tools/results/ranks.md

Each process has one thread. Wall time is that of the first process. Processor time is that of the process that has most of it: what a
machine with a core for each would take, but for waiting. Of `round_weights` the rounding is told from the gathering of what it needs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import passes
from ir import edit
from ir.capture import capture
from ir.sites import layers
from passes.data import evidence
from passes.ranks import Ranks
from tools import bench_model

WORLDS = (1, 2, 4)
BATCHES = 8
START = "canonicalize, untie, fold_norm, annotate(scheme='W4A16', group=64, symmetric=False)"
STEPS = {
    "observe": "observe",
    "assign_bits": "assign_bits(bits=3.3, tokens=2048, measure=512)",
    "round_weights": "round_weights",
}
HEAD = (
    "| model | step | processes | wall, s | speed-up | processor, s | speed-up | codes that differ | scales, greatest change | widths |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass
class Clock:
    """Wall and processor seconds, by what they were spent on."""

    spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    def timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time counts."""

        def counted(*given: Any, **named: Any) -> Any:
            wall, processor = time.perf_counter(), time.process_time()
            made = run(*given, **named)
            before = self.spent.get(name, (0.0, 0.0))
            self.spent[name] = before[0] + time.perf_counter() - wall, before[1] + time.process_time() - processor
            return made

        return counted


def wide() -> tuple[nn.Module, list[Tensor]]:
    """A random Llama whose layers have a thousand channels, and as many tokens as teach something of these."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4
    )
    generator = torch.Generator().manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval(), [torch.randint(2048, (8, 256), generator=generator) for _ in range(BATCHES)]


def work(bench: Path, name: str, rows: int, steps: Sequence[str], folder: Path) -> None:
    """Run all steps in this process, as one of those that the environment tells of."""
    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    if name == "wide":
        model, calibration = wide()
    else:
        loaded = bench_model.load(bench)
        model, calibration = loaded.model, loaded.calibration
    calibration = [batch[:rows] for batch in calibration[:BATCHES]]
    start = passes.compile(capture(model), START).graph
    clock = Clock()
    evidence.codes_of = clock.timed("rounding", evidence.codes_of)
    tensors: dict[str, Tensor] = {}
    widths: dict[str, str] = {}
    for step in steps:
        ranks.everyone(None)
        run = clock.timed(step, passes.compile)
        made = run(edit.copied(start), STEPS[step], calibration, ranks=ranks).graph
        if step == "assign_bits":
            widths = {layer.path: str(layer.site("weight").encoding) for layer in layers(made)}
        if step == "round_weights":
            tensors = {str(node.target): edit.attribute(made, node).detach() for node in made.graph.find_nodes(op="get_attr")}
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"spent": clock.spent, "widths": widths}), encoding="utf-8")
    if ranks.first:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "tensors.safetensors")
    ranks.close()


def launch(bench: Path, name: str, rows: int, steps: Sequence[str], world: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `world` processes says."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    known = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tools.bench_ranks", str(bench), "--work", name, "--rows", str(rows), "--steps", *steps]
    command += ["--out", str(folder)]
    started = [subprocess.Popen(command, env=known | {"RANK": str(rank)}) for rank in range(world)]
    if sum(abs(process.wait()) for process in started):
        raise SystemExit(f"{world} processes failed on {name}")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def table(name: str, steps: Sequence[str], said: dict[int, list[dict[str, Any]]], tensors: dict[int, dict[str, Tensor]]) -> list[str]:
    """The table of one model."""
    lines = []
    for step in [*(step for step in steps if step != "round_weights"), *(("gathering", "rounding") if "round_weights" in steps else ())]:
        alone = seconds(said[1], step)
        for world, ranks in said.items():
            wall, processor = seconds(ranks, step)
            times = f"{wall:.1f} | {alone[0] / wall:.2f} | {processor:.1f} | {alone[1] / processor:.2f}"
            same = {"rounding": differences(tensors[1], tensors[world]) + " | "}.get(step, " |  | ")
            same += ("identical" if ranks[0]["widths"] == said[1][0]["widths"] else "DIFFERS") if step == "assign_bits" else ""
            lines.append(f"| {name} | {step} | {world} | {times} | {same} |")
    return lines


def seconds(ranks: Sequence[dict[str, Any]], step: str) -> tuple[float, float]:
    """Wall time of the first process, and the greatest processor time."""

    def of(said: dict[str, Any], part: int) -> float:
        spent = said["spent"]
        return float(spent["round_weights"][part] - spent["rounding"][part] if step == "gathering" else spent[step][part])

    return of(ranks[0], 0), max(of(said, 1) for said in ranks)


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """The share of codes that differ, and the greatest relative difference of scales."""
    codes = [key for key in one if key.endswith("_codes")]
    wrong = sum(int((one[key] != other[key]).sum()) for key in codes) / sum(one[key].numel() for key in codes)
    scales = [key for key in one if key.endswith("_scale")]
    most = max(float(((one[key] - other[key]).abs() / one[key].abs().clamp_min(1e-12)).max()) for key in scales)
    return f"{wrong:.2g} | {most:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--models", nargs="*", default=["trained", "wide"])
    parser.add_argument("--worlds", nargs="*", type=int, default=list(WORLDS))
    parser.add_argument("--rows", type=int, default=8, help="windows of 256 tokens in each of eight batches")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--note", default="", help="a sentence on the machine, for the table")
    parser.add_argument("--work", default="", help="be one of the processes")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.work:
        work(given.bench, given.work, given.rows, given.steps, given.out)
        return
    cores = os.cpu_count()
    lines = [
        f"# Several processes\n\n`python -m tools.bench_ranks {given.bench}`, torch {torch.__version__}, {cores} cores, one thread each,",
        f"gloo on one machine. {given.note} Speed-up of wall time is at most {cores} here; that of processor time, of the process",
        "that has most of it, is what a core for each would give, but for waiting. `gathering` and `rounding` are the parts of",
        f"`round_weights`. Calibration: {BATCHES} batches of {given.rows} windows of 256 tokens.",
        f"\n{HEAD}",
    ]
    for name in given.models:
        said, tensors = {}, {}
        for world in given.worlds:
            with tempfile.TemporaryDirectory() as folder:
                said[world] = launch(given.bench, name, given.rows, given.steps, world, Path(folder))
                tensors[world] = {key: value.clone() for key, value in load_file(Path(folder) / "tensors.safetensors").items()}
        lines += table(name, given.steps, said, tensors)
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
