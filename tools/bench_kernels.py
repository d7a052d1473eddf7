"""The kernels of `backends.triton_gpu` on one GPU: are they right, how fast are they, and beside what.

    python -m tools.bench_kernels                # on a machine with a GPU: tools/results/kernels.{md,json,svg}, in under ten minutes
    python -m tools.bench_kernels --dry          # anywhere: the checks on eager operators, and a report of made-up figures

Checks come first, and end the run if one fails. Then come ceilings, our operators beside torch in bfloat16, peers that are installed
(`tools.peers.gpu_kernels`), and a profile of the worst. A budget (`--seconds`) shortens the repetitions and leaves out peers, not checks.
"""

import argparse
import itertools
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ir.errors import FxpressError, OptionError
from tools.gpu import timing
from tools.gpu.cases import LARGE, LOST, SMALL, Outcome, cases, run
from tools.gpu.checks import Inputs, described
from tools.gpu.checks_rows import Rows
from tools.gpu.problems import Problem, Product, operator, ours, rotation
from tools.gpu.profile import least, profile
from tools.gpu.report import Found, Profile, write
from tools.gpu.targets import BF16, OURS, ROTATION, ROTATION_TOKENS, TORCH, WIDE, Key, problems
from tools.gpu.timing import Budget, Ceilings, Timing, timed
from tools.peers.gpu_kernels import PACKAGES, PEERS, ROTATIONS, Absent, Rotation, torch_bf16

RESULTS = Path(__file__).parent / "results"
RESERVED = 45.0  # seconds kept for the profile and the report


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    budget = Budget(options.seconds)
    try:
        out = folder(options.out, options.dry)
        device = torch.device("cpu") if options.dry else timing.require_gpu()
        found = Found(
            timing.environment(PACKAGES), shlex.join(["python", "-m", "tools.bench_kernels", *arguments]), options.dtype, options.seed
        )
        workers = 0 if options.dry else options.workers
        wrong = checked(found, device, workers, budget)
        if not wrong and not options.dry:
            wrong = measured(found, device, budget)
            if not wrong:
                save(found, out, budget)  # a peer may break the GPU, or take all the time
                compared(found, device, budget, options.peers)
        elif not wrong:
            made_up(found)
    except FxpressError as error:
        print(error, file=sys.stderr)
        return 2
    if wrong:
        print(f"WRONG: {len(wrong)} checks failed; nothing was written.", *(f"\n{each.case}\n    {each.wrong}" for each in wrong), sep="\n")
        return 1
    for path in save(found, out, budget):
        print("wrote", path)
    every = found.verdicts
    said = "MADE-UP FIGURES of a dry run: " if options.dry else ""
    print(f"{said}{found.checked} checks passed, {sum(v.reached >= 1 for v in every)} of {len(every)} targets met, {found.seconds:.0f} s")
    return 0


def folder(given: Path | None, dry: bool) -> Path:
    """Where results go: made-up ones nowhere near the measured ones."""
    if dry and given and given.resolve() == RESULTS.resolve():
        raise OptionError("a dry run's figures are made up", where=f"--out {given}", remedy="give another folder")
    return given or (Path(tempfile.mkdtemp(prefix="kernels-")) if dry else RESULTS)


def checked(found: Found, device: torch.device, workers: int, budget: Budget) -> list[Outcome]:
    """What is wrong, of all cases."""
    every = list(cases(SMALL if device.type == "cpu" else LARGE))
    print(f"checking {len(every)} cases on {device} from seed {found.seed}", flush=True)
    outcomes = run(every, found.seed, device, workers, Budget(budget.left / 2))
    found.checked = len(outcomes)
    print(f"checked after {budget.used:.0f} s", flush=True)
    return [each for each in outcomes if each.wrong]


def measured(found: Found, device: torch.device, budget: Budget) -> list[Outcome]:
    """Times of our operators and of torch, and a profile of the worst; stops at a result of ours that is wrong, which it returns."""
    found.ceilings = timing.ceilings(device)
    print(found.ceilings, flush=True)
    for problem in _problems(found):
        if budget.left < RESERVED:
            found.left_out.append(f"{problem.key(OURS)}")
        elif wrong := _reported(partial(_ours, found, problem, device, budget)):
            return [Outcome(f"{problem.key(OURS)}", wrong)]
    for case, given in _rotations(found, device):
        if wrong := _reported(partial(_rotation, found, case, given, budget)):
            return [Outcome(described(case), wrong)]
    for problem in [each for each in _problems(found) if each.key(OURS) in found.worst()]:
        if wrong := _reported(partial(_profiled, found, problem, device)):  # some machines do not allow it
            found.absent.setdefault("torch.profiler", set()).add(wrong)
    return []


def _reported(part: Callable[[], str]) -> str:
    """What is wrong, in words, of what raises too."""
    try:
        return part()
    except Exception as error:
        return "".join(traceback.format_exception(error, limit=-3))


def compared(found: Found, device: torch.device, budget: Budget, peers: list[str]) -> None:
    """Times of peers, as far as there is time, until one breaks the GPU."""
    for case, given in _rotations(found, device):
        for who, make in ROTATIONS.items():
            _attempted(found, budget, Key(ROTATION, case.K, 0, case.M, who), partial(_rotated, make, case, given["x"]))
    for problem in _problems(found):
        given = problem.inputs(found.seed, device)
        for who in peers:
            _attempted(found, budget, problem.key(who), partial(_prepared, who, problem, given))


def _problems(found: Found) -> Iterator[Problem]:
    for each, K, N, M in problems():
        yield Problem(each, K, N, M, getattr(torch, found.dtype))


def _ours(found: Found, problem: Problem, device: torch.device, budget: Budget) -> str:
    """Time our operator and torch; what is wrong with ours, at this very shape, if anything is."""
    given = problem.inputs(found.seed, device)
    with timing.poisoned():
        y = operator(problem.case, given)
    if wrong := problem.case.judge(given, (y,)):
        return wrong
    key, theirs = problem.key(OURS), Key(BF16, problem.K, problem.N, problem.M, TORCH)
    found.timings[key], found.moved[key] = timed(ours(problem, given), budget.replays()), problem.moved
    if theirs not in found.timings:
        found.timings[theirs] = timed(torch_bf16(problem, given).calls, budget.replays())
    print(f"{key}: {found.timings[key].median:.2f} µs, {found.ratio(key):.2f} x torch bf16", flush=True)
    return ""


def _rotation(found: Found, case: Rows, given: Inputs, budget: Budget) -> str:
    if wrong := case.judge(given, case.call(given)):
        return wrong
    found.timings[Key(ROTATION, case.K, 0, case.M, OURS)] = timed([partial(case.call, given)] * 16, budget.replays())
    return ""


def _profiled(found: Found, problem: Problem, device: torch.device) -> str:
    assert found.ceilings is not None
    found.profiles.append(profile(problem, ours(problem, problem.inputs(found.seed, device)), found.ceilings))
    return ""


def _rotations(found: Found, device: torch.device) -> Iterator[tuple[Rows, Inputs]]:
    """The transform with quantization, at channels of `WIDE`, with inputs."""
    for M in ROTATION_TOKENS:
        case = rotation(M, WIDE[0], getattr(torch, found.dtype))
        yield case, case.inputs(torch.Generator(device).manual_seed(found.seed))


def _rotated(make: Rotation, case: Rows, x: Tensor) -> list[Product]:
    return [make(case, x)] * 16


def _prepared(who: str, problem: Problem, given: Inputs) -> list[Product]:
    """A peer's calls, after a look at its result."""
    prepared = PEERS[who](problem, given)
    distance = problem.distance(given, prepared.finished(prepared.calls[0]()))
    if not distance <= prepared.off:
        raise Absent(f"its result is {distance:.2g} away at {problem.key(who)}")
    return prepared.calls


def _attempted(found: Found, budget: Budget, key: Key, prepare: Callable[[], list[Product]]) -> None:
    """Note a peer's time, or why there is none."""
    reasons = found.absent.setdefault(key.who, set())
    if any(map(LOST.search, itertools.chain(*found.absent.values()))):
        return
    if budget.left < RESERVED:
        found.left_out.append(f"{key}: {key.who}")
        return
    try:
        found.timings[key] = timed(prepare(), budget.replays())
        print(f"{key}: {key.who} {found.timings[key].median:.2f} µs", flush=True)
    except Absent as reason:
        reasons.add(str(reason))
    except Exception as error:  # of other people's compilers and kernels
        reasons.add(f"{type(error).__name__} at {key}: {str(error)[:200]}")


def save(found: Found, out: Path, budget: Budget) -> list[Path]:
    """The report of what there is by now."""
    found.seconds = budget.used
    return write(found, out)


def made_up(found: Found) -> None:
    """Figures that no GPU gave, so that everything after a measurement runs."""
    found.environment |= {"device": "MADE-UP GPU"}
    found.ceilings = Ceilings(4e12, 8e14, 2.0)
    for problem in _problems(found):
        floor = max(problem.moved / found.ceilings.copy, 2 * problem.M * problem.K * problem.N / found.ceilings.product)
        key, theirs = problem.key(OURS), Key(BF16, problem.K, problem.N, problem.M, TORCH)
        found.timings[key], found.moved[key] = _timing(1.5e6 * floor + 2), problem.moved
        found.timings[theirs] = _timing(max(2e6 * problem.K * problem.N / found.ceilings.copy, 1e6 * floor) + 2)
        found.timings[problem.key("gemlite")] = _timing(2.5e6 * floor + 2)
    worst = [problem for problem in _problems(found) if problem.key(OURS) in found.worst()]
    found.profiles = [Profile(problem.key(OURS), {"made_up_kernel": 1.0}, least(problem, found.ceilings, 90)) for problem in worst]
    found.absent["humming"] = {"not installed, in a dry run"}
    for M in ROTATION_TOKENS:
        found.timings[Key(ROTATION, WIDE[0], 0, M, OURS)] = _timing(2 + M / 100)


def _timing(median: float) -> Timing:
    return Timing(median, 0.02 * median, timing.REPLAYS)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder; tools/results if left out, and a temporary one with --dry")
    parser.add_argument("--seconds", type=float, default=540, help="that the whole run may take")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of our activations and of peers'; torch's are bfloat16"
    )
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)), help="processes that check")
    parser.add_argument("--dry", action="store_true", help="what a CPU can run, with made-up figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
