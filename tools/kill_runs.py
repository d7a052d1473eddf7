"""Kill compiles at random moments and run the same command again until it finishes: are the bits the same, how much work was done twice?

python -m tools.kill_runs --out tools/results/kills.md
"""

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import passes
from ir.capture import capture
from passes.data import evidence, stream
from passes.memo import results as resuming
from passes.memo.folder import Memo

LAYERS, HIDDEN, VOCABULARY, WINDOW = 12, 128, 512, 128
PIPELINES = {  # what is killed how often; kills of the first count as the twenty
    "w4a16": 20,
    "mixed(bits=3.0, steps=60, own_text=False)": 5,
}
SECONDS = 2.0  # between states of long loops: the runs here are short
TOLD = {"seconds", "notes", "peak_bytes"}  # in the report, that differ from run to run


def captured() -> Any:
    """The model's graph, and calibration data."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2 * WINDOW,
    )  # fmt: skip
    data = [torch.randint(VOCABULARY, (8, WINDOW), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    return capture(transformers.LlamaForCausalLM(config).eval()), data


def one(folder: Path, pipeline: str, model: Any, data: Any) -> None:
    """One compile, which appends a line to a log as each piece of work begins and ends."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    whole = resuming.Results.steps

    def say(what: str) -> None:
        os.write(log, f"{time.time()} {what}\n".encode())

    def told(work: Any, name: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            say(f"begin {name(*given)}")
            found = work(*given, **named)
            say(f"end {name(*given)}")
            return found

        return run

    def steps(self: Any, ctx: Any, numbers: Any, doing: str, state: Any) -> Any:
        for step in whole(self, ctx, numbers, doing, state):
            say(f"begin {doing} {step}")
            yield step
            say(f"end {doing} {step}")

    resuming.Results.steps = steps  # type: ignore[method-assign, assignment]
    evidence._round = told(evidence._round, lambda ctx, group, *given: f"round {group.layers[0].path}")
    stream.Stream.enter = told(stream.Stream.enter, lambda self, block, *given: f"run {block.exit[0].name}")  # type: ignore[method-assign]
    passes.compile(model, pipeline, data, cache=Memo(folder / "cache", seconds=SECONDS)).save(folder / "out", overwrite=True)


def start(folder: Path, pipeline: str, given: Any) -> int:
    """The same compile in a process of its own, each time; it begins behind the imports and the capture, which take no part."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            one(folder, pipeline, *given)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def finished(process: int) -> bool:
    """Whether a process has ended well, once it has ended."""
    return os.waitpid(process, 0)[1] == 0


def bits(folder: Path) -> dict[str, str]:
    """A digest of every file of a result; of the report what does not tell of the run itself."""
    found = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.name == "report.html":
            continue
        if file.name == "report.json":
            content = json.dumps(without(json.loads(content)), sort_keys=True).encode()
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


def without(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without(value) for key, value in data.items() if key not in TOLD}
    return [without(item) for item in data] if isinstance(data, list) else data


def work(folder: Path, killed: float | None = None) -> tuple[float, float]:
    """Seconds of work that was done, and of those of work that was done before or was cut off by a kill."""
    begun: dict[str, float] = {}
    done: dict[str, list[float]] = defaultdict(list)
    lost = 0.0
    for line in (folder / "log").read_text().splitlines():
        moment, kind, what = line.split(" ", 2)
        if kind == "end":
            done[what].append(float(moment) - begun.pop(what))
        else:
            if begun and killed is not None and min(begun.values()) < killed <= float(moment):
                lost += killed - min(begun.values())  # what holds other work began first
                begun.clear()
            begun[what] = float(moment)
    rounds = {what: seconds for what, seconds in done.items() if not what.startswith("run ")}
    runs = {what: seconds for what, seconds in done.items() if what.startswith("run ")}
    # Runs of blocks lie within the rounding that needs them: of those that repeat only the repetition counts.
    repeated = sum(sum(seconds[1:]) for seconds in (*rounds.values(), *runs.values()))
    return sum(seconds[0] for seconds in rounds.values()), lost + repeated


@dataclass
class Kill:
    """One kill: when, as a share of the whole run; seconds and blocks of work done twice; whether the bits are the same."""

    share: float
    seconds: float
    blocks: float
    same: bool
    clean: bool


def kill(pipeline: str, given: Any, share: float, whole: float, block: float, expected: dict[str, str]) -> Kill:
    """Run, kill, run again."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        process = start(folder, pipeline, given)
        time.sleep(share * whole)
        os.kill(process, signal.SIGKILL)
        killed = time.time()
        os.waitpid(process, 0)
        clean = not (folder / "out").exists() or bits(folder / "out") == expected
        assert finished(start(folder, pipeline, given))
        _, redone = work(folder, killed) if (folder / "log").exists() else (0.0, 0.0)
        return Kill(share, redone, redone / block, bits(folder / "out") == expected, clean)


def uninterrupted(pipeline: str, given: Any) -> tuple[float, float, dict[str, str]]:
    """Seconds of a run, seconds of the work of one block or step, and the result's bits."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, began = Path(scratch), time.time()
        assert finished(start(folder, pipeline, given))
        seconds = time.time() - began
        done, _ = work(folder)
        return seconds, done / (2 * LAYERS), bits(folder / "out")  # attention and MLP are blocks of their own


def page(pipeline: str, whole: float, block: float, kills: list[Kill]) -> list[str]:
    answer = {True: "yes", False: "NO"}
    rows = [f"| {k.share:.2f} | {k.seconds:.2f} | {k.blocks:.2f} | {answer[k.same]} | {answer[k.clean]} |" for k in kills]
    mean = sum(k.blocks for k in kills) / len(kills)
    return [
        f"## `{pipeline}`",
        "",
        f"{len(kills)} kills; a run takes {whole:.1f} s, the work on one of {2 * LAYERS} blocks {block:.2f} s.",
        f"Work done twice: {mean:.2f} blocks on average, {max(k.blocks for k in kills):.2f} at most.",
        "",
        "| killed at this share of the run | seconds of work done twice | blocks | same bits | nothing half-written |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    given = captured()
    lines = [
        "# Compiles that were killed",
        "",
        f"Made by `python -m tools.kill_runs` on {os.cpu_count()} cores that other work shared, one thread a run.",
        "",
        f"A random Llama of {LAYERS} layers and {HIDDEN} channels is compiled in a process that gets SIGKILL at a moment drawn evenly over",
        "the time of an uninterrupted run, behind imports and capture; then the same compile runs until it finishes. Work is the rounding",
        "of layers, with the runs of blocks that it needs, and the steps of loops; what the kill cut off counts as done twice, from its",
        f"beginning. States of loops are kept every {SECONDS:.0f} s here.",
        "",
    ]
    for pipeline, count in PIPELINES.items():
        whole, block, expected = uninterrupted(pipeline, given)
        kills: list[Kill] = []
        for _ in range(count):
            kills.append(kill(pipeline, given, draw.random(), whole, block, expected))
            print(pipeline, kills[-1], flush=True)
        lines += page(pipeline, whole, block, sorted(kills, key=lambda k: k.share))
        if options.out:
            options.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
