"""Memory of a compile, pass by pass, beyond what importing everything and loading the model take.

    python -m tools.bench_memory ../shared/bench --out tools/results/memory.md

Each compile runs three times, in a process of its own. *Resident*: the greatest resident size within a stage by the kernel's own mark,
which is set back when a stage begins, less what was resident before the compile. *Returned*: the same where the C library gives freed
blocks of 64 KiB and more back to the system at once; what is less there is kept, not used. *Live*: bytes of tensors that the compile has
made and still holds, without what single operators need on the way. Of a model in a folder, whose weights are mapped, pages count too.
"""

import argparse
import multiprocessing
import os
import re
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import passes
from ir.encoding import Encoding
from ir.memory import give_back
from ir.numerics import QParams
from ir.rounding import METHODS, YAQA, Evidence, Nearest
from passes.progress import Progress
from tools import bench_model
from tools.bench_model import report

T = TypeVar("T")
MB = 1e6
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
WAYS: dict[str, dict[str, str]] = {"resident": {}, "returned": RETURNED, "live": {}}  # how a process counts, and its environment
OPENED = "canonicalize, untie, fold_norm, center_norm, rotate_channels(where=['R1', 'R2'])"
# Of the wide model few rows are looked at, and one weight is rounded as it would be: all of them take hours.
BENCH = ("mixed(bits=2.28, steps={steps})", "w4a16", "w4a4")
WIDE = (f"{OPENED}, annotate(scheme='W2A16', group=64, symmetric=False), learn_rounding(steps={{steps}})",)
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8}
SECTIONS = {
    "bench": "The bench model",
    "wide": "A wide model of random weights",
    "scratch": "The same, what passes make on disk",
    "folder": "The same from a folder",
}
ROWS, LENGTH = 4, 64  # of its calibration data


@dataclass(frozen=True)
class OneOfMany(YAQA):
    """YAQA with one sweep for the first down projection, nearest rounding for the others: the same memory in less time."""

    sweeps: int = 1
    seen: set[torch.Size] = field(default_factory=set)

    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """See `Rounding`."""
        if W.shape[0] >= W.shape[1] or self.seen:
            return Nearest().solve(W, encoding, evidence)
        self.seen.add(W.shape)
        return super().solve(W, encoding, evidence)


class Live(TorchDispatchMode):
    """Bytes of the storages that calls have made and that are still held, and their greatest number since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
                self._take(tensor)
        return result

    def _take(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known and size:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def _resident(name: str) -> int:
    """Bytes that the kernel states for this process: VmRSS now, VmHWM at most since the mark was set back."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@dataclass(frozen=True)
class Stages(Progress):
    """Takes the peak of every pass, and of every long loop in it, from what a compile says of its progress."""

    live: Live | None = None
    stack: list[str] = field(default_factory=lambda: ["capture"])
    peaks: dict[str, int] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """A pass begins: `[2/9] untie`, or the lowering."""
        self.mark()
        self.stack[:] = [re.sub(r"^\[[\d/]+\] |\(.*", "", text)]

    def track(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """A stage of its own while the loop runs."""
        self.mark()
        self.stack.append(f"{self.stack[0]}: {doing}")
        yield from items
        self.mark()
        self.stack.pop()

    def mark(self) -> None:
        """A stage ends: keep its peak, and set the mark back."""
        peak = self.live.peak if self.live else _resident("VmHWM")
        self.peaks[self.stack[-1]] = max(self.peaks.get(self.stack[-1], 0), peak)
        if self.live:
            self.live.peak = self.live.bytes
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True)
class Job:
    """One compile that is measured: of which model, and how is counted.

    Args:
        section: "bench" for its model; a wide one of random weights is made here, compiled with scratch files, or read from a folder.
        folder: of this model, and of scratch files.
    """

    bench: Path
    section: str
    pipeline: str
    way: str
    folder: str

    def run(self) -> dict[str, Any]:
        """What a process of its own found."""
        os.environ.update(WAYS[self.way])
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                return pool.apply(_measured, (self,))
        finally:
            for name in WAYS[self.way]:
                del os.environ[name]


def _model(job: Job) -> tuple[torch.nn.Module, list[Tensor]]:
    bench = bench_model.load(job.bench)
    if job.section == "bench":
        return bench.model, bench.calibration
    METHODS["yaqa"] = OneOfMany
    model = passes.load_model(job.folder, "auto", scratch=job.folder) if job.section == "folder" else _wide()
    return model, list(torch.cat(bench.calibration)[:ROWS, :LENGTH].split(2))


def _wide() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **SIZES)
    return transformers.LlamaForCausalLM(config).eval()


def _save(folder: str) -> None:
    _wide().save_pretrained(folder, max_shard_size="60MB")


def _measured(job: Job) -> dict[str, Any]:
    model, calibration = _model(job)
    give_back()  # what loading has freed is not the model's
    live = Live() if job.way == "live" else None
    stages = Stages(live=live)
    stages.mark()
    stages.peaks.clear()
    before = 0 if live else _resident("VmRSS")
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with live or nullcontext():
        scratch = job.folder if job.section == "scratch" else None
        made = passes.compile(model, job.pipeline, calibration, progress=stages, scratch=scratch)
    stages.mark()
    return {
        "before": before,
        "model": sum(tensor.nbytes for tensor in model.parameters()),
        "block": _block_bytes(model),
        "seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime - started,
        "bits": made.effective_bits,
        "peaks": {name: peak - before for name, peak in stages.peaks.items()},
    }


def _block_bytes(model: torch.nn.Module) -> int:
    """Bytes of the linears of the greatest decoder layer, by what their paths have in common up to its number."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        number = re.match(r".*?\.\d+\.", name)
        if number and isinstance(module, torch.nn.Linear):
            sizes[number[0]] = sizes.get(number[0], 0) + sum(tensor.nbytes for tensor in module.parameters())
    return max(sizes.values())


def table(bench: Path, section: str, pipeline: str, folder: str) -> list[str]:
    """Peaks of all stages, counted each way, in MB and, for the greatest, in terms of the model and one block."""
    found = {way: Job(bench, section, pipeline, way, folder).run() for way in WAYS}
    one = found["resident"]
    model, block = one["model"], one["block"]
    limit = 1.5 * model + block
    lines = [
        f"`{pipeline}`: the model has {model / MB:.0f} MB, one layer of it {block / MB:.1f}; 1.5 × the model and one layer are "
        f"{limit / MB:.0f}. Imports and the model take {one['before'] / MB:.0f} MB; {one['seconds']:.0f} seconds of the processor.\n",
        "| stage | " + " | ".join(f"{way}, MB" for way in WAYS) + " |",
        "|---|" + "---|" * len(WAYS),
    ]
    lines += [
        f"| {stage} | " + " | ".join(f"{own['peaks'].get(stage, 0) / MB:.0f}" for own in found.values()) + " |" for stage in one["peaks"]
    ]
    greatest = {way: max(own["peaks"].values()) for way, own in found.items()}
    lines.append("| **the greatest** | " + " | ".join(f"**{peak / MB:.0f}**" for peak in greatest.values()) + " |")
    lines.append("| over the model | " + " | ".join(f"{peak / model:.2f} ×" for peak in greatest.values()) + " |")
    lines.append("| over 1.5 × the model and one layer | " + " | ".join(f"{peak / limit:.2f} ×" for peak in greatest.values()) + " |")
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--steps", type=int, default=4, help="of learned rounding: more take no more memory")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--scratch", type=Path, help="a folder on a disk, for a model that is read from one, and scratch files")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    def tables(section: str) -> list[str]:
        lines = []
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            if section == "folder":
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own: this one has never held the model
                    pool.apply(_save, (folder,))
            for text in BENCH if section == "bench" else WIDE:
                lines += [*table(options.bench, section, text.format(steps=options.steps), folder), ""]
        return lines

    sections: dict[str, tuple[str, Callable[[], list[str]]]] = {name: (head, partial(tables, name)) for name, head in SECTIONS.items()}
    report(f"# Memory\n\n`python -m tools.bench_memory {options.bench}`.\n", sections, options.sections, options.out)


if __name__ == "__main__":
    main()
