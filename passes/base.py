"""The contract of a pass: `Pass`, its `Effect`, and the `Context` that a run hands from pass to pass."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor
from torch.fx import GraphModule

from ir.errors import DataError, OptionError
from ir.statistics import Statistics
from passes.calls import call_text
from passes.memo.results import Results
from passes.progress import Progress
from passes.ranks import Ranks

if TYPE_CHECKING:
    from passes.backend import Backend

T = TypeVar("T")


class Effect(Enum):
    """What a pass may change. It decides which check runs after the pass and when statistics go stale.

    OBSERVE changes nothing. ANNOTATE changes encodings only. PRESERVE changes the graph but not the function. CHANGE changes the function.
    """

    OBSERVE = "observe"
    ANNOTATE = "annotate"
    PRESERVE = "preserve"
    CHANGE = "change"


@dataclass(frozen=True)
class Skip:
    """A layer, or other weight bytes, left as they were: where, why, how many bytes, and whether the recipe had asked for them."""

    path: str
    reason: str
    bytes: int
    asked: bool = False


@dataclass
class Context:
    """What passes of one compile share.

    Args:
        calibration: flat inputs, one list of tensors per batch; empty if none was given.
        probe: flat inputs that the checks of effects run on.
        seed: of everything random.
        progress: shows long loops.
        statistics: what `observe` measured; None before it runs and after the graph changes.
        skipped: what passes left out, filled by `skip`.
        notes: sentences for the report.
        tables: rows for the report, by the table's title.
        backend: the target; what it does not support is refused as soon as it is annotated.
        original: the graph as it was before the first pass, over the caller's tensors; None where a pass is run by itself.
        allow_partial: leave unsupported layers as they are, instead of refusing.
        memo: what earlier compiles have computed of this one.
        ranks: the processes that share the work.
        part: the graph is a part of a model, on trial: patterns may match none of its layers, and budgets are the nearest that it has.
    """

    calibration: Sequence[list[Tensor]] = ()
    probe: Sequence[Tensor] = ()
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    statistics: Statistics | None = None
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    backend: "Backend | None" = None
    original: GraphModule | None = None
    allow_partial: bool = False
    memo: Results = field(default_factory=Results)
    ranks: Ranks = field(default_factory=Ranks)
    part: bool = False

    def skip(self, path: str, reason: str, size: int, asked: bool = False) -> None:
        """Record that the weight bytes at `path` are left as they are, and why."""
        self.skipped.append(Skip(path, reason, size, asked))

    def rebind(self, convert: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        """Bring calibration data and probe into the form of the graph's inputs after a pass has changed them."""
        self.calibration = [convert(batch) for batch in self.calibration]
        self.probe = convert(self.probe) if self.probe else self.probe

    def total(
        self, zeros: Callable[[], Sequence[Tensor]], take: Callable[[int, list[Tensor], Sequence[Tensor]], None], doing: str = ""
    ) -> list[Tensor]:
        """Sums over the calibration data, which all processes share: see `Ranks.total`.

        Args:
            zeros: makes the sums of nothing.
            take: adds what a batch has, given by number and inputs, to sums.
            doing: what the progress bar says, if there is to be one.
        """
        own = self.ranks.share(len(self.calibration))
        steps = iter(self.track(own, doing) if doing else own)

        def one(index: int, sums: Sequence[Tensor]) -> None:
            next(steps)
            take(index, self.calibration[index], sums)

        sums = self.ranks.total(len(self.calibration), zeros, one)
        for _ in steps:  # lets the bar end
            pass
        return sums

    def track(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """`items`, with a progress bar."""
        return self.progress.track(items, doing)


@dataclass(frozen=True)
class Pass:
    """A transformation of a graph: a frozen dataclass whose fields are its options.

    A subclass sets `effect` and defines `run`. Its name is its class name in snake case; its text form is a call with the options that
    differ from their defaults, `round_weights(damping=0.05)`.
    """

    effect: ClassVar[Effect]
    targeted: ClassVar[bool] = False  # whether it looks at `ctx.backend`, so that results of another target are others
    files: ClassVar[tuple[str, ...]] = ()  # options that name files, which a recipe may only name below the working folder

    def take_several(self, option: str) -> None:
        """Make a tuple of an option that lists texts, or is one; for `__post_init__`."""
        given = getattr(self, option)
        object.__setattr__(self, option, (given,) if isinstance(given, str) else tuple(given))

    def take_names(self, option: str, known: Collection[str]) -> None:
        """Make a tuple of an option that lists names, or is one; for `__post_init__`.

        Raises:
            OptionError: no name, or one that is not known.
        """
        self.take_several(option)
        names = getattr(self, option)
        wrong = [name for name in names if name not in known]
        if wrong or not names:
            problem = f"there is no {wrong[0]!r}" if wrong else "none is named"
            raise OptionError(problem, where=f"{self.name()}({option}=...)", remedy=f"there are {list(known)}")

    def need_calibration(self, ctx: Context) -> None:
        """For `needs`.

        Raises:
            DataError: no calibration data.
        """
        if not ctx.calibration:
            raise DataError(f"{self.name()} needs calibration data", remedy="pass calibration=[{'input_ids': ids}, ...]")

    def needs(self, ctx: Context) -> None:
        """Raise an `FxpressError` if the compile was not given what the pass needs; called for every pass before the first one runs."""

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Raise an `FxpressError` if the pass cannot run on this graph; called just before it runs."""

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Change `gm` in place and return the number of sites changed."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """The name in pipeline text."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __str__(self) -> str:
        return call_text(self.name(), self)


@dataclass(frozen=True)
class Record:
    """What one pass did: sites changed, seconds taken, and the relative error of the outputs it caused (None where nothing may change).

    `peak_bytes` is what the process had in memory at most meanwhile, `own_bytes` what of it was not pages of files; 0 if not known.
    """

    text: str
    effect: Effect
    sites: int
    seconds: float
    difference: float | None
    skipped: tuple[Skip, ...] = ()
    peak_bytes: int = 0
    own_bytes: int = 0
