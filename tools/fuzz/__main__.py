"""`python -m tools.fuzz --minutes 60 [--target NAME]`: fuzz in processes with limits, keep what fails, print counts.

A worker reads cases one after the other. What is no error of ours, what takes too long or too much memory, and what kills the worker, is
kept as a folder under --keep, with what was raised; `--replay FOLDER --target NAME` reads it again.
"""

import argparse
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from tools.fuzz.mutate import Case
from tools.fuzz.targets import TARGETS, cases, check

SECONDS = 20  # of computing that a case may take
TURN = 0.5  # seconds of computing for a target before it is the next one's turn
MEMORY = 2 << 30  # bytes that cases may take beside what the libraries take
COUNTED = ("cases", "taken", "refused", "failed")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    made.add_argument("--minutes", type=float, default=60.0, help="for all targets together")
    made.add_argument("--target", action="append", help="one target; may be repeated; all without it")
    made.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where failing cases are kept")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--replay", type=Path, help="read one kept case")
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return made


def work(names: list[str], scratch: Path, seed: int, seconds: float) -> None:
    """Read cases of all targets in turn; `scratch` holds the one at hand, `counts.json` what became of those before."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:  # what libraries load and compile with the first cases is not the case's
        for case in TARGETS[name].corpus():
            assert check(TARGETS[name], case, _empty(scratch / "case")), f"{name} refuses its own corpus"
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    counts = {name: dict.fromkeys(COUNTED, 0) | {"slowest": 0.0} for name in names}
    pools = {name: cases(TARGETS[name], sys.maxsize, seed) for name in names}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, pool in pools.items():
            (scratch / "target").write_text(name)
            until = time.process_time() + TURN
            while time.process_time() < until:
                _one(name, next(pool), scratch, counts[name])
            (scratch / "counts.json").write_text(json.dumps(counts))


def _one(name: str, case: Case, scratch: Path, counts: dict[str, Any]) -> None:
    folder, started = _empty(scratch / "case"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # nobody handles it: it ends the process, whatever code runs
    try:
        counts["taken" if check(TARGETS[name], case, folder) else "refused"] += 1
    except BaseException:  # what a target raises beside our errors is what is looked for
        counts["failed"] += 1
        _keep(scratch, name, traceback.format_exc())
    signal.setitimer(signal.ITIMER_PROF, 0)
    counts["cases"] += 1
    counts["slowest"] = max(counts["slowest"], time.process_time() - started)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _keep(scratch: Path, target: str, said: str) -> None:
    """Keep the case at hand, one for each place and kind of what was raised."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    place = next((line for line in reversed(lines) if line.startswith("File ")), "")
    name = hashlib.blake2b(f"{place} {lines[-1].partition(':')[0]}".encode(errors="replace"), digest_size=4).hexdigest()
    kept = scratch / "found" / target / name
    if not kept.exists() and (scratch / "case").exists():
        shutil.copytree(scratch / "case", kept / "case")
        (kept / "raised.txt").write_text(said, encoding="utf-8", errors="backslashreplace")


def fuzz(names: list[str], keep: Path, seed: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Run workers, one after the other where one is killed, until the time is over; returns the counts of each target."""
    total: dict[str, dict[str, Any]] = {name: dict.fromkeys((*COUNTED, "killed"), 0) | {"slowest": 0.0} for name in names}
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            command = [sys.executable, "-m", "tools.fuzz", "--work", folder, "--seed", str(seed), "--minutes", str(left / 60)]
            chosen = [word for name in names for word in ("--target", name)]
            said = subprocess.run([*command, *chosen], check=False, capture_output=True, text=True, errors="replace")
            counts = json.loads((scratch / "counts.json").read_text()) if (scratch / "counts.json").exists() else {}
            for name, found in counts.items():
                for key, count in found.items():
                    total[name][key] = max(total[name][key], count) if key == "slowest" else total[name][key] + count
            if said.returncode:
                at = scratch / "target"
                if not at.exists():
                    raise SystemExit(said.stderr[-4000:])
                total[at.read_text()]["killed"] += 1
                _keep(scratch, at.read_text(), f"{said.stderr[-4000:]}\nthe process ended with {said.returncode}")
            if (scratch / "found").exists():
                shutil.copytree(scratch / "found", keep, dirs_exist_ok=True)
        seed += 1
    return total


def main() -> int:
    options = parser().parse_args()
    names = options.target or list(TARGETS)
    if options.work:
        work(names, options.work, options.seed, 60 * options.minutes)
        return 0
    if options.replay:
        TARGETS[names[0]].read(options.replay)
        return 0
    total = fuzz(names, options.keep, options.seed, 60 * options.minutes)
    for name, counts in total.items():
        print(f"{name:11}", "  ".join(f"{counts[key]:8} {key}" for key in (*COUNTED, "killed")), f"  slowest {counts['slowest']:.2f} s")
    failed = sum(counts["failed"] + counts["killed"] for counts in total.values())
    print(f"failing cases are in {options.keep}" if failed else "nothing but errors of ours")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
