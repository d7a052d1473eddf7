"""What a process takes and what is left: resident memory, watched meanwhile, free memory and free disk."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.01  # seconds between two looks: a thread of its own, as resetting the system's own peak would falsify what others read of it
STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
GROUPS = (  # of processes, whose memory is limited: greatest, and used by now
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass
class Memory:
    """Bytes of a process that are in memory; zero where the system does not tell.

    Args:
        resident: all of them.
        own: those that are not pages of files, which the system takes back when it needs them.
    """

    resident: int = 0
    own: int = 0

    def raise_to(self, other: "Memory") -> None:
        """Take the greater of both, each by itself."""
        self.resident, self.own = max(self.resident, other.resident), max(self.own, other.own)


def memory() -> Memory:
    """What this process has now; known on Linux only."""
    found = _kilobytes(STATUS)
    resident = found.get("VmRSS", 0)
    return Memory(resident, resident - found.get("RssFile", 0))


@contextmanager
def watched() -> Iterator[Memory]:
    """The most memory that the process has while the block runs, told at its end."""
    peak, ended = memory(), threading.Event()

    def look() -> None:
        while not ended.wait(EVERY):
            peak.raise_to(memory())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak.raise_to(memory())


def free_memory() -> int | None:
    """Bytes that this process can still take, its group's limit counted; None where the system does not tell."""
    found = [value for value in (_kilobytes(MEMINFO).get("MemAvailable"), *map(_left, GROUPS)) if value is not None]
    return min(found, default=None)


def _left(group: tuple[Path, Path]) -> int | None:
    try:
        most, used = (path.read_text(encoding="ascii").strip() for path in group)
    except OSError:
        return None
    if not (most.isdigit() and used.isdigit()):
        return None
    return int(most) - int(used) + _cached(group[1].with_name("memory.stat"))


def _cached(stat: Path) -> int:
    """Bytes of files that a group holds in memory and does not need."""
    try:
        pairs = (line.split() for line in stat.read_text(encoding="ascii").splitlines())
        return next((int(value) for name, value in pairs if name == "inactive_file"), 0)
    except (OSError, ValueError):
        return 0


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def free_disk(path: Path) -> int:
    """Bytes that can still be written into a folder, or where it would be made."""
    return shutil.disk_usage(existing(path)).free


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, as far as they are still there."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it went meanwhile
                total += Path(place, name).lstat().st_size
    return total


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines `name: number kB` of a file, in bytes; none where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, _, value in pairs}
