"""The online Hadamard transform in ONNX Runtime: Kronecker form against full matrix and against the quantized linear that reads it.

    python tools/bench_hadamard.py --out tools/results/hadamard.md

Every model is made by our own backend from a captured module. Rounds are interleaved, variant after variant, so that a machine that
speeds up or slows down does so for all; figures are medians over rounds.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import passes
from backends.onnx_qdq import OnnxQdq
from ir.hadamard import hadamard, orders

SHAPES = ((704, 256), (2048, 2048), (8192, 2048))  # channels of the transform, outputs of the linear after it
TOKENS = (1, 128)
LARGEST_FULL = 2048  # greatest matrix that is applied whole
LINEARS = {"4-bit, groups of 128": "w4a16(group={group}, symmetric=True, rounding='nearest')", "W8A8 per token": "w8a8(rounding='nearest')"}


class Model(nn.Module):
    """A transform of the last axis, `kind` kronecker, full or none, and a linear if `rows` is not 0."""

    def __init__(self, channels: int, kind: str, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.channels, self.kind = channels, kind
        self.linear = nn.Linear(channels, rows, bias=False) if rows else nn.Identity()
        if kind == "full":
            self.register_buffer("matrix", hadamard(channels, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "kronecker":
            x = torch.ops.fxpress.hadamard(x, self.channels)
        elif self.kind == "full":
            x = x @ self.matrix
        return self.linear(x)


def variants(channels: int, rows: int) -> Iterator[tuple[str, str, int, str]]:
    """A label, the kind of transform, the outputs of the linear, the pipeline."""
    yield f"Kronecker {' × '.join(map(str, orders(channels)))}", "kronecker", 0, "canonicalize"
    if channels <= LARGEST_FULL:
        yield "full matrix", "full", 0, "canonicalize"
    for label, text in LINEARS.items():
        group = 128 if channels % 128 == 0 else 64
        pipeline = text.format(group=group)
        yield label.replace("128", str(group)), "none", rows, pipeline
        yield f"{label.replace('128', str(group))}, after the Kronecker form", "kronecker", rows, pipeline


def prepare(channels: int, rows: int) -> dict[str, ort.InferenceSession]:
    made = {}
    for label, kind, outputs, pipeline in variants(channels, rows):
        x = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(1))
        executable = passes.compile(Model(channels, kind, outputs), pipeline, [{"x": x}], OnnxQdq(threads=1), args=(x,)).executable
        made[label] = executable.session
    return made


def measure(sessions: dict[str, ort.InferenceSession], channels: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call, by variant, in every round; a round makes several calls where they are short."""
    x = np.random.default_rng(0).standard_normal((1, tokens, channels)).astype(np.float32)
    calls = 20 if tokens == 1 else 2
    times: dict[str, list[float]] = {label: [] for label in sessions}
    order, draw = list(sessions), random.Random(0)
    for index in range(rounds + 1):
        draw.shuffle(order)  # what ran before leaves its mark on the caches
        for label in order:
            session = sessions[label]
            name = session.get_inputs()[0].name
            started = time.perf_counter()
            for _ in range(calls):
                session.run(None, {name: x})
            if index:  # the first round warms up
                times[label].append(1e3 * (time.perf_counter() - started) / calls)
    return times


def section(channels: int, rows: int, rounds: int) -> str:
    sessions = prepare(channels, rows)
    found = [measure(sessions, channels, tokens, rounds) for tokens in TOKENS]
    linear = next(label for label in sessions if label.startswith("4-bit"))
    lines = [f"## {channels} channels, a linear to {rows}", ""]
    lines.append("| | " + " | ".join(f"{tokens} token{'s' * (tokens > 1)}, ms | × the 4-bit linear" for tokens in TOKENS) + " |")
    lines.append("|---" * (1 + 2 * len(TOKENS)) + "|")
    for label in sessions:
        cells = [f"{statistics.median(times[label]):.3f} | {ratio(times[label], times[linear]):.2f}" for times in found]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor())  # noqa: SIM115, PTH123
    load = f"load at the start {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    how = f"Medians of {options.rounds} interleaved rounds, and of ratios within a round"
    parts = [f"One thread, {processor}, onnxruntime {ort.__version__}, {load}. {how}."]
    for channels, rows in SHAPES:
        parts.append(section(channels, rows, options.rounds))
        print(parts[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# Online Hadamard transforms in ONNX Runtime\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
