"""The closing table of `make demo`: what a compressed folder costs and what it gains, beside the same model in full precision.

    python tools/demo.py fixtures/tiny-llama out/demo

Both run in ONNX Runtime on the CPU, in turns, one session at a time (idle threads of another one spin); times are the best of several runs.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import passes
from passes.commands.loading import load_model
from passes.compiled import Compiled
from passes.measure import greedy

PREFILL, DECODE, TURNS, RUNS = 128, 64, 3, 3
MEGABYTE = 1e6


@dataclass
class Speed:
    """Tokens per second, the best of all runs."""

    prefill: float = 0.0
    decode: float = 0.0

    def measure(self, model: Compiled, ids: torch.Tensor) -> None:
        """Time one run of `ids` and of greedy tokens after it."""
        started = time.perf_counter()
        stream = greedy(model, ids, DECODE + 1)
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        self.prefill = max(self.prefill, ids.shape[1] / (first - started))
        self.decode = max(self.decode, DECODE / (time.perf_counter() - first))


def megabytes(folder: Path, names: Sequence[str] = ("*.safetensors", "*.onnx", "*.onnx.data")) -> float:
    """The size of the model's files in a folder."""
    return sum(file.stat().st_size for name in names for file in folder.glob(name)) / MEGABYTE


def table(source: Path, folder: Path) -> Table:
    """Measure both and lay the figures side by side."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    plain = folder.with_name(f"{folder.name}-float32")
    original = load_model(str(source))
    passes.compile(original, "canonicalize", backend="onnx").save(plain, overwrite=True)
    ids = torch.randint(3, original.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    speeds = Speed(), Speed()
    for _ in range(TURNS):
        for path, speed in zip((plain, folder), speeds, strict=True):
            model = passes.load(path)
            for _ in range(RUNS):
                speed.measure(model, ids)
            del model
    before, after = megabytes(plain), megabytes(folder)
    perplexity = [values["perplexity"] for values in report["measures"].values()]
    rows = [
        ("model on disk, MB", before, after, 2),
        ("perplexity on the test text", *perplexity, 2),
        (f"prefill of {PREFILL} tokens, tokens/s", speeds[0].prefill, speeds[1].prefill, 0),
        ("decode, tokens/s", speeds[0].decode, speeds[1].decode, 0),
    ]
    title = "What it cost and what it gained, in ONNX Runtime"
    made = Table("", "float32", "compressed", "ratio", title=title, title_justify="left")
    for name, old, new, digits in rows:
        made.add_row(name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new / old:.3f}")
    made.add_row("bits per compressed weight", "32", f"{report['coverage']['effective_bits']:.2f}", "")
    made.add_row("weight bytes compressed", "", f"{report['coverage']['share']:.0%}", "")
    made.caption = f"The checkpoint itself ({source}) has {megabytes(source):.2f} MB."
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkpoint's folder")
    parser.add_argument("folder", type=Path, help="the folder that fxpress compile wrote, with --text")
    options = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    console = Console(markup=False, highlight=False)
    (console if console.is_terminal else Console(markup=False, highlight=False, width=120)).print(table(options.source, options.folder))


if __name__ == "__main__":
    main()
