"""Whether there is room, on disk and in memory, for what a compile is estimated to take."""

import tempfile
from pathlib import Path

from ir.errors import DataError
from passes.base import Context
from passes.preflight.estimates import Estimate
from passes.preflight.resources import existing, free_disk, free_memory

NEEDED = 1.2  # times the estimate have to be free


def check_room(found: Estimate, ctx: Context, out: Path | None) -> None:
    """Refuse what does not fit.

    Raises:
        DataError: too little disk or memory is free: how much is needed, and where.
    """
    scratch = Path(tempfile.gettempdir())
    needs: dict[Path, int] = {scratch: found.scratch}
    if out is not None:
        needs[existing(out)] = found.written
    by_disk: dict[int, list[Path]] = {}
    for path in needs:
        by_disk.setdefault(path.stat().st_dev, []).append(path)
    for paths in by_disk.values():
        needed, free = sum(NEEDED * needs[path] for path in paths), free_disk(paths[0])
        if needed > free:
            raise DataError(
                f"the disk has {_size(free)} free, and about {_size(needed)} are needed",
                where=" and ".join(map(str, paths)),
                remedy="free space, write to another disk, or set TMPDIR to a folder on another one",
            )
    available = free_memory()
    if available is None:
        ctx.notes.append("pre-flight: this system does not tell how much memory is free, so it was not checked")
        return
    wanted = NEEDED * (found.peak.own - found.before.own)
    if wanted > available:
        raise DataError(
            f"{_size(available)} of memory are free, and about {_size(wanted)} more are needed",
            where=max(found.steps, key=lambda step: step.memory.own).name,
            remedy="calibrate on fewer or shorter windows, use a narrower dtype, or a machine with more memory",
        )


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
