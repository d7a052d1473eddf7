"""Time forms of the kernels on one GPU, and write the fastest for each problem into `backends/triton_gpu/configs.json`.

    python -m tools.tune_kernels                 # on a machine with a GPU, in under ten minutes; run again, it goes on where it stopped
    python -m tools.tune_kernels --again         # problems that are in the table too, around their forms of now
    python -m tools.tune_kernels --dry           # anywhere: everything but kernels and clocks, into a temporary file

Problems are those of `tools.gpu.targets`, and the protocol that of `tools.gpu.timing`. Each form is checked against float64 before it is
timed, in processes that also compile it; one that is wrong is reported, one that does not compile is left out. What was found is written
after every problem.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from backends.triton_gpu import select
from backends.triton_gpu.select import Config
from ir.errors import FxpressError, OptionError
from ir.files import appearing
from tools.gpu import timing
from tools.gpu.candidates import CHECKED, SMALL, Formed, architecture, candidates, tuned_by
from tools.gpu.cases import LOST, Outcome, run
from tools.gpu.problems import Problem, turns
from tools.gpu.targets import FORMATS, OURS, TOKENS, problems
from tools.gpu.timing import Budget, timed

TABLE = Path(__file__).parents[1] / "backends" / "triton_gpu" / "configs.json"
AGAIN = 3  # of the fastest forms are timed again
RESERVED = 10.0  # seconds
TRIED_DRY = 2  # forms of a problem
DRY_TOKENS, DRY_FORMATS = (1, 64), ("W4A16", "W4A8")
Row = dict[str, Any]
Right = Mapping[Problem, Sequence[Config]]
Clocked = tuple[dict[Config, float], list[str]]  # microseconds, and what is wrong
Clock = Callable[[Problem, Sequence[Config], Budget], Clocked]


@dataclass(frozen=True)
class Here:
    """What timings hold for. `arch` is the nearest that forms are counted for, 90 of Hopper."""

    device: str
    arch: int
    torch: str
    triton: str

    @classmethod
    def now(cls) -> "Here":
        return cls(torch.cuda.get_device_name(), architecture(), torch.__version__, timing.version("triton") or "unknown")


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    budget = Budget(options.seconds)
    try:
        path = place(options.out, options.dry)
        device = torch.device("cpu") if options.dry else timing.require_gpu()
        here = Here("MADE UP", 90, "", "") if options.dry else Here.now()
        asked = [Problem(each, K, N, M, torch.bfloat16) for each, K, N, M in problems(options.tokens) if each.name in options.formats]
        todo = [each for each in asked if options.again or row_of(path, each, here) is None]
        print(f"{len(todo)} of {len(asked)} problems to tune on {here.device}, into {path}", flush=True)
        right, wrong = checked(todo, here, path, device, 0 if options.dry else options.workers, budget)
        wrong += tune(right, here, path, made_up if options.dry else partial(clocked, device), budget)
    except FxpressError as error:
        print(error, file=sys.stderr)
        return 2
    left = sum(row_of(path, each, here) is None for each in asked)
    for each in wrong:
        print("WRONG:", each)
    print(
        f"{len(asked) - left} of {len(asked)} problems are tuned, after {budget.used:.0f} s{'; run it again for the others' * bool(left)}"
    )
    return 1 if wrong else 0


def place(given: Path | None, dry: bool) -> Path:
    """The table to write; of a dry run, a copy that nothing reads."""
    if not dry:
        return given or TABLE
    if given and given.resolve() == TABLE.resolve():
        raise OptionError("a dry run's figures are made up", where=f"--out {given}", remedy="give another file")
    copied = given or Path(tempfile.mkdtemp(prefix="kernels-")) / TABLE.name
    return Path(shutil.copyfile(TABLE, copied))


def checked(
    todo: Sequence[Problem], here: Here, path: Path, device: torch.device, workers: int, budget: Budget
) -> tuple[dict[Problem, list[Config]], list[str]]:
    """Forms to time of each problem, those that compile and are right; and what is wrong. What was checked is compiled, on disk."""
    tried = {each: candidates(tuned_by(each), each, here.arch, _known(path, each, here)) for each in todo}
    tried = {each: found if device.type == "cuda" else found[:TRIED_DRY] for each, found in tried.items()}
    size = CHECKED if device.type == "cuda" else SMALL
    cases = {Formed.of(each, config, size): None for each, found in tried.items() for config in found}
    outcomes = dict(zip(cases, run(cases, int.from_bytes(os.urandom(3)), device, workers, Budget(0.6 * budget.left)), strict=True))
    right = {each: [config for config in found if not outcomes[Formed.of(each, config, size)].wrong] for each, found in tried.items()}
    good, reasons = sum(not each.wrong for each in outcomes.values()), Counter(_reason(each) for each in outcomes.values() if each.raised)
    print(f"{good} of {len(outcomes)} forms compile and are right, after {budget.used:.0f} s; others: {dict(reasons)}", flush=True)
    bad = [each for each in outcomes.values() if each.wrong and (not each.raised or LOST.match(each.wrong.partition(": ")[2]))]
    return right, [f"{each.case}: {each.wrong}" for each in bad]


def _reason(outcome: Outcome) -> str:
    """The kind of error."""
    return outcome.wrong.partition(":")[0]


def tune(right: Right, here: Here, path: Path, clock: Clock, budget: Budget) -> list[str]:
    """Time, and write the fastest, problem after problem; what is wrong, in words."""
    wrong = []
    for problem, found in right.items():
        if budget.left < RESERVED:
            break
        times, bad = clock(problem, found, budget)
        wrong += bad
        if times:
            best = min(times, key=times.__getitem__)
            put(path, problem, here, best, times[best])
            print(f"{problem.key(OURS)}: {times[best]:.2f} µs, of {len(found)} forms {best}", flush=True)
    return wrong


def clocked(device: torch.device, problem: Problem, found: Sequence[Config], budget: Budget) -> Clocked:
    """The fastest forms at the problem's own shape, where they are checked once more."""
    given, launch, case = problem.inputs(0, device), tuned_by(problem).launch, problem.case
    around = turns(problem, given)
    times: dict[Config, float] = {}
    for config in found:
        if budget.left > RESERVED:
            try:
                times[config] = timed([partial(launch, case, turn, config) for turn in around]).median
            except Exception as error:  # more shared memory than there is, say
                print(f"{problem.key(OURS)}, {config}: {type(error).__name__}: {str(error)[:100]}")
    wrong = []
    fastest: dict[Config, float] = {}
    for config in sorted(times, key=times.__getitem__)[:AGAIN]:
        with timing.poisoned():
            y = launch(case, given, config)
        if bad := case.judge(given, (y,)):
            wrong.append(f"{problem.key(OURS)}, {config}: {bad}")
        else:
            fastest[config] = timed([partial(launch, case, turn, config) for turn in around], timing.WANTED).median
    return fastest, wrong


def made_up(_: Problem, found: Sequence[Config], __: Budget) -> Clocked:
    """Figures that no GPU gave: each form is faster than the one before."""
    return {config: 100.0 - index for index, config in enumerate(found)}, []


def row_of(path: Path, problem: Problem, here: Here) -> Row | None:
    """What the table has of a problem on this device with these versions."""
    wanted = _about(problem, here) | asdict(here)
    return next((row for row in _read(path)["timed"] if wanted.items() <= row.items()), None)


def put(path: Path, problem: Problem, here: Here, config: Config, microseconds: float) -> None:
    """A row of the table, in the place of that of the same problem and architecture."""
    table, about = _read(path), _about(problem, here)
    kept = [row for row in table["timed"] if not about.items() <= row.items()]
    table["timed"] = [*kept, about | {"config": asdict(config), "us": round(microseconds, 3)} | asdict(here)]
    parts = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in table.items()]
    with appearing(path) as draft:
        draft.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def _read(path: Path) -> dict[str, list[Row]]:
    table: dict[str, list[Row]] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _about(problem: Problem, here: Here) -> Row:
    case = problem.case
    shape = {"m": case.M, "n": case.N, "k": case.K, "group": case.group}
    return {"kernel": tuned_by(problem).name, "arch": here.arch, "bits": case.bits} | shape


def _known(path: Path, problem: Problem, here: Here) -> Config | None:
    row = row_of(path, problem, here)
    return select.config_of(row["config"]) if row else None


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="another table to go on with; the library's if left out")
    parser.add_argument("--seconds", type=float, default=540, help="that the whole run may take")
    parser.add_argument("--formats", nargs="*", choices=tuple(FORMATS), help="all if left out")
    parser.add_argument("--tokens", nargs="*", type=int, help=f"{', '.join(map(str, TOKENS))} if left out")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="processes that compile and check")
    parser.add_argument("--again", action="store_true", help="problems that are in the table too")
    parser.add_argument("--dry", action="store_true", help="what a CPU can run, with made-up figures")
    options = parser.parse_args(arguments)
    options.formats = options.formats or (DRY_FORMATS if options.dry else tuple(FORMATS))
    options.tokens = options.tokens or (DRY_TOKENS if options.dry else TOKENS)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
