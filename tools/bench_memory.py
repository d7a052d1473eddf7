"""Memory of a compile, pass by pass, beside what importing everything and loading the model take.

    python -m tools.bench_memory ../shared/bench --out tools/results/memory.md

Every figure is of a fresh process, in MB of 10⁶ bytes. *Resident* is the greatest resident size within a stage, by the kernel's own mark, which is set back when
a stage begins, less what was resident before the compile. *Returned* is the same where the C library gives freed tensors of 64 KiB or more back
to the system at once (`MALLOC_MMAP_THRESHOLD_`): what it has less is memory that is kept and not used. *Live* counts the bytes of tensors that the
compile has made and still holds, those of the caller's model not among them: what the program asks for, without the workspace of single operators.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import passes
from ir.blocks import blocks
from ir.sites import layers
from passes.progress import Progress
from tools import bench_model
from tools.bench_model import report

T = TypeVar("T")
MB = 1e6
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
WAYS = {"resident": {}, "returned": RETURNED, "live": {}}  # how a process counts, and its environment
PRESETS = ("mixed(bits=2.28, steps={steps})", "mixed(bits=3.0, steps={steps})", "w4a16", "w4a4")
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8}
WIDE_WINDOWS = 16


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
    """One compile that is measured: the model of the bench folder, or a wide one of random weights; the pipeline, and how is counted."""

    bench: Path
    wide: bool
    pipeline: str
    way: str

    def run(self) -> dict[str, Any]:
        """What a process of its own found."""
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measured, (self,))


def _model(job: Job) -> tuple[torch.nn.Module, list[Tensor]]:
    bench = bench_model.load(job.bench)
    if not job.wide:
        return bench.model, bench.calibration
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **WIDE)
    windows = torch.cat(bench.calibration)[:WIDE_WINDOWS]
    return transformers.LlamaForCausalLM(config).eval(), list(windows.split(8))


def _measured(job: Job) -> dict[str, Any]:
    model, calibration = _model(job)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not the model's
    live = Live() if job.way == "live" else None
    stages = Stages(live=live)
    stages.mark()
    stages.peaks.clear()
    before = 0 if live else _resident("VmRSS")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    if live:
        with live:
            made = passes.compile(model, job.pipeline, calibration, progress=stages)
    else:
        made = passes.compile(model, job.pipeline, calibration, progress=stages)
    stages.mark()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - used
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"before": before, "model": size, "block": _block_bytes(passes.compile(model, "canonicalize").graph), "seconds": used}
    return found | {"bits": made.effective_bits, "peaks": {name: peak - before for name, peak in stages.peaks.items()}}


def _block_bytes(gm: torch.fx.GraphModule) -> int:
    """Bytes of the weights of the greatest layer: an attention and an MLP, each a block of the graph."""
    _, cut = blocks(gm)
    sizes = {layer.node: layer.weight.meta["val"].numel() * layer.weight.meta["val"].element_size() for layer in layers(gm)}
    own = [sum(sizes.get(node, 0) for node in block.nodes if sizes) for block in cut[1:-1]]
    return max(a + b for a, b in zip(own, own[1:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--one", nargs=3)
    options = parser.parse_args()
    wide, pipeline, way = options.one
    os.environ.update(WAYS[way])
    found = Job(options.bench, wide == "wide", pipeline, way).run()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
