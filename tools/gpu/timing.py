"""How kernels are timed, on one GPU: launches in a CUDA graph, weights that no cache holds, medians over replays.

`timed` is the protocol. Everything that is timed against one another goes through it in one process, after `ceilings` of the same run.
Outputs that hold no numbers before a kernel writes them come from `poisoned`.
"""

import importlib.metadata
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ir.errors import BackendError, OptionError

ROTATED = 240_000_000  # bytes of copies that a graph goes round: four times the L2 of an H200
REPLAYS = 20  # the fewest that a median is taken of
WANTED = 60  # as long as there is time
LEAST = 1e-3  # seconds that a graph runs, so that the events around it do not count
LAUNCHES = 1024  # the most in a graph
GARBAGE = 113  # what integers are poisoned with
CAPABILITY = (8, 0)  # the oldest that kernels are compiled for

Call = Callable[[], object]


def require_gpu() -> torch.device:
    """The GPU.

    Raises:
        BackendError: there is none, or it is too old.
        OptionError: kernels would run in the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}:
        raise OptionError("kernels are run by Triton's interpreter", where="TRITON_INTERPRET", remedy="unset the variable")
    remedy = "run it on a machine with an NVIDIA GPU, a driver and a CUDA build of torch; --dry runs here what a CPU can run"
    if not torch.cuda.is_available():
        raise BackendError("torch finds no CUDA GPU", where=f"torch {torch.__version__}", remedy=remedy)
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        raise BackendError(
            f"{torch.cuda.get_device_name()} is of compute capability {found[0]}.{found[1]}",
            remedy=f"take a GPU of {CAPABILITY[0]}.{CAPABILITY[1]} or newer",
        )
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over replays, and the distance of the quartiles."""

    median: float
    spread: float
    replays: int

    @classmethod
    def of(cls, times: Sequence[float]) -> "Timing":
        low, middle, high = statistics.quantiles(times, n=4)
        return cls(middle, high - low, len(times))


class Budget:
    """Seconds that a run may take. What is left decides how often a graph is replayed, and which measurements are left out."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.monotonic(), seconds

    @property
    def used(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.used

    def replays(self) -> int:
        return WANTED if self.left > self.seconds / 2 else REPLAYS


def copies(size: int) -> int:
    """How many copies of `size` bytes a graph goes round, so that none comes from a cache."""
    return max(2, math.ceil(ROTATED / size))


def timed(calls: Sequence[Call], replays: int = REPLAYS) -> Timing:
    """Microseconds of a call, one after the other in a CUDA graph, which goes round `calls` until it is long enough.

    Everything that is compiled or tuned at the first call is done before; outputs share the memory of the graph.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph, rounds = captured(calls), 1
    first = min(_replayed(graph, 3))
    wanted = min(math.ceil(1e3 * LEAST / first), LAUNCHES // len(calls))
    if wanted > 1:
        graph, rounds = captured(list(calls) * wanted), wanted
    _replayed(graph, 3)
    return Timing.of([1e3 * each / (rounds * len(calls)) for each in _replayed(graph, max(replays, REPLAYS))])


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of `calls`, which ran before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Milliseconds of each replay; all are enqueued at once, so that the GPU does not wait for the CPU between them."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


@dataclass(frozen=True)
class Ceilings:
    """What the GPU does at best: bytes a second that a copy moves, operations a second of a product, a launch's microseconds."""

    copy: float
    product: float
    launch: float


def ceilings(device: torch.device, side: int = 8192, size: int = 2**30) -> Ceilings:
    """Measured now: a copy of `size` bytes, a product of bfloat16 matrices `side` x `side`, a kernel that writes one number."""
    source, target = (torch.randint(0, 100, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    copy = timed([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = timed([lambda: a @ b])
    launch = timed([lambda: source[:1].fill_(1)] * 64)
    return Ceilings(2e6 * size / copy.median, 2e6 * side**3 / product.median, launch.median)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated without a value holds NaN, or 113: an output that a kernel does not write whole is seen."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            empty = make(*arguments, **options)
            return empty.fill_(float("nan") if empty.is_floating_point() else GARBAGE)

        return made

    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    patches = [mock.patch.object(owner, name, filling(getattr(owner, name))) for owner, name in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def environment(packages: Sequence[str]) -> dict[str, str]:
    """What a figure depends on: the device, versions, the commit."""
    found = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties()
        found |= {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": str(about.multi_processor_count),
            "L2": f"{about.L2_cache_size / 2**20:.0f} MiB",
            "memory": f"{about.total_memory / 2**30:.0f} GiB",
        }
    return found | {name: version(name) or "absent" for name in packages} | {"commit": _commit()}


def version(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    root = Path(__file__).parents[1]
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()
