"""What a run of `tools.bench_kernels` found, and how it is written: `kernels.json`, `kernels.md`, `kernels.svg`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ir.files import appearing
from tools.gpu.plots import Curves, panels
from tools.gpu.targets import BF16, OURS, TORCH, Key, Verdict, verdicts
from tools.gpu.timing import ROTATED, Ceilings, Timing

SHOWN = 8  # of targets missed, that are profiled


@dataclass(frozen=True)
class Profile:
    """Where the time of a call goes, and what it would be at least."""

    key: Key
    kernels: Mapping[str, float]  # microseconds of each, per call
    least: Mapping[str, float]  # microseconds, by what limits


@dataclass
class Found:
    """Everything measured; times are microseconds."""

    environment: dict[str, str]
    command: str
    dtype: str
    seed: int
    checked: int = 0
    ceilings: Ceilings | None = None
    timings: dict[Key, Timing] = field(default_factory=dict)
    moved: dict[Key, int] = field(default_factory=dict)  # the fewest bytes, of ours
    absent: dict[str, set[str]] = field(default_factory=dict)  # peers, and why they are not there, or not everywhere
    left_out: list[str] = field(default_factory=list)  # for want of time
    profiles: list[Profile] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def medians(self) -> dict[Key, float]:
        return {key: timing.median for key, timing in self.timings.items()}

    @property
    def shares(self) -> dict[Key, float]:
        """Of the copy's bytes a second."""
        copy = self.ceilings.copy if self.ceilings else float("nan")
        return {key: 1e6 * size / self.timings[key].median / copy for key, size in self.moved.items() if key in self.timings}

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.medians, self.shares)

    def ratio(self, key: Key) -> float | None:
        """How many times faster than torch in bfloat16."""
        theirs = self.timings.get(Key(BF16, key.K, key.N, key.M, TORCH))
        return theirs.median / self.timings[key].median if theirs else None

    def worst(self) -> list[Key]:
        """Of targets missed against torch, those missed by most."""
        missed = sorted((v for v in self.verdicts if v.reached < 1 and v.who == TORCH), key=lambda v: v.reached)
        return [each.key for each in missed[:SHOWN]]


def write(found: Found, folder: Path) -> list[Path]:
    """The three files; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "kernels.json": json.dumps(_plain(found), indent=1, ensure_ascii=False) + "\n",
        "kernels.svg": panels(_curves(found)),
        "kernels.md": markdown(found),
    }
    for name, text in texts.items():
        with appearing(folder / name) as draft:
            draft.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def markdown(found: Found) -> str:
    """The report."""
    device = found.environment.get("device", "no GPU")
    parts = [f"# Kernels on one {device}", "", *_how(found), *_targets(found), *_times(found), *_profiles(found), *_missing(found)]
    return "\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _how(found: Found) -> Iterator[str]:
    about = ", ".join(f"{name} {value}" for name, value in found.environment.items())
    yield f"{about}. Seed {found.seed}, {found.seconds:.0f} s. Command: `{found.command}`."
    yield ""
    yield (
        f"{found.checked} checks against float64 came first, on random inputs and outputs that held NaN, each again in a CUDA graph. "
        f"Times are of one call in a CUDA graph that goes round {ROTATED / 1e6:.0f} MB of copies of the weight: the median over replays "
        f"and, after ±, half the distance of the quartiles. Activations are {found.dtype}, or int8 codes that another operator made; they "
        "are the same in every call, as if the operator before had just written them."
    )
    yield ""
    if found.ceilings:
        copy, product, launch = found.ceilings.copy, found.ceilings.product, found.ceilings.launch
        said = f"copy {copy / 1e12:.2f} TB/s, product of bfloat16 matrices {product / 1e12:.0f} TFLOP/s, a launch {launch:.1f} µs"
        yield from (f"Ceilings, measured in this run: {said}.", "")


def _targets(found: Found) -> Iterator[str]:
    every = found.verdicts
    if not every:
        return
    yield from (f"## Targets: {sum(v.reached >= 1 for v in every)} of {len(every)} met", "", "In parentheses, what to stretch for.", "")
    rows = ([v.words, v.wanted, f"{v.measured:.2f}", v.said] for v in every)
    yield from table(("target", "wanted", "measured", ""), rows)


def _times(found: Found) -> Iterator[str]:
    yield from ("## Times", "", "![ratios to torch bf16](kernels.svg)", "")
    groups: dict[tuple[str, int, int], list[Key]] = {}
    for key in found.timings:
        groups.setdefault((key.format, key.K, key.N), []).append(key)
    shares = found.shares
    for (name, k, n), keys in groups.items():
        yield from (f"### {name}, {k} × {n}" if n else f"### {name}, {k} channels", "")
        rows = []
        for key in sorted(keys, key=lambda key: (key.M, key.who != OURS, key.who)):
            timing, ratio = found.timings[key], found.ratio(key)
            share = f"{100 * shares[key]:.0f} %" if key in shares else ""
            cells = [str(key.M), key.who, f"{timing.median:.2f} ± {timing.spread / 2:.2f}", str(timing.replays)]
            rows.append([*cells, f"{ratio:.2f}" if ratio else "", share])
        yield from table(("M", "", "µs", "replays", "× torch bf16", "of copy bandwidth"), rows)


def _profiles(found: Found) -> Iterator[str]:
    if not found.profiles:
        return
    yield from (
        "## The targets missed by most",
        "",
        "Microseconds of a call, kernel by kernel (torch.profiler), and what it takes at least.",
        "",
    )
    rows = []
    for each in found.profiles:
        kernels = ", ".join(f"`{name[:60]}` {time:.2f}" for name, time in sorted(each.kernels.items(), key=lambda item: -item[1])[:4])
        rows.append(
            [str(each.key), f"{found.timings[each.key].median:.2f}", kernels, ", ".join(f"{k} {v:.2f}" for k, v in each.least.items())]
        )
    yield from table(("", "measured", "kernels", "at least"), rows)


def _missing(found: Found) -> Iterator[str]:
    if any(found.absent.values()):
        yield from ("## Not compared", "", *(f"- {who}: {'; '.join(sorted(why))}." for who, why in found.absent.items() if why), "")
    if found.left_out:
        yield from ("## Not measured, for want of time", "", *(f"- {each}" for each in found.left_out), "")


def _curves(found: Found) -> dict[str, Curves]:
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for key in found.timings:
        ratio = found.ratio(key)
        if key.who != TORCH and ratio is not None:
            curves.setdefault(f"{key.format}, {key.K} × {key.N}", {}).setdefault(key.who, {})[key.M] = ratio
    return curves


def _plain(found: Found) -> dict[str, object]:
    timings = [asdict(key) | asdict(timing) | {"share": found.shares.get(key)} for key, timing in found.timings.items()]
    return {
        **{name: getattr(found, name) for name in ("environment", "command", "dtype", "seed", "seconds", "checked", "left_out")},
        "ceilings": asdict(found.ceilings) if found.ceilings else None,
        "timings": timings,
        "verdicts": [asdict(each) | {"reached": each.reached} for each in found.verdicts],
        "absent": {who: sorted(why) for who, why in found.absent.items()},
        "profiles": [asdict(each) for each in found.profiles],
    }
