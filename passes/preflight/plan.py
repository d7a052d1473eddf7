"""Before long work: a real run of one block through the pipeline and the backend, and from it what all of it will take."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.fx import GraphModule

from ir import edit
from ir.canonical import canonicalize
from ir.memory import give_back
from passes.backend import Backend
from passes.base import Context
from passes.folders import PARTIAL, beside, refused_in_words
from passes.pipeline import Pipeline
from passes.preflight.estimates import CHECKS, WRITE, Axis, Estimate, Step, estimate
from passes.preflight.part import Kind, kinds
from passes.preflight.rehearsal import Rehearsal, Size, learns, rehearse
from passes.preflight.resources import existing, memory
from passes.preflight.room import check_room

LARGE = 10**9  # bytes of weights from which on a compile takes long
BATCHES = (2, 4)  # of calibration data, of which two there are passes that need
STEPS = (2, 4)  # of passes that learn
QUICK = 20.0  # seconds: a first rehearsal that is shorter is run again, without what the first use of libraries takes


@dataclass(frozen=True)
class _Sizes:
    """How much of a model its rehearsals take, along each axis."""

    places: tuple[int, ...]
    another: int
    layers: int
    more: float
    batches: tuple[int, int]
    steps: tuple[int, int]

    @classmethod
    def of(cls, found: Sequence[Kind], batches: int, steps: int) -> "_Sizes":
        """One layer of each kind, and then another one of the most frequent kind."""
        typical = found[0]
        others = sum((len(kind.places) - 1) * kind.weights for kind in found)
        least, most = (min(batches, count) for count in BATCHES)
        short, long = (min(steps, count) for count in STEPS)
        layers = sum(len(kind.places) for kind in found)
        places = tuple(sorted(kind.places[0] for kind in found))
        return cls(places, typical.places[1], layers, others / max(typical.weights, 1), (least, most), (short, long))


def weight_bytes(gm: GraphModule) -> int:
    """Bytes of all stored tensors; shared ones count once."""
    tensors = (edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr"))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def wanted(gm: GraphModule, asked: bool | None) -> bool:
    """Whether to look before the work: as asked, else if the model is large."""
    return weight_bytes(gm) >= LARGE if asked is None else asked


def plan(gm: GraphModule, pipeline: Pipeline, ctx: Context, target: Backend, out: Path | None = None) -> Estimate | None:
    """Run a part of a captured graph through pipeline and backend, estimate what all of it takes, and refuse what there is no room for.

    The part is one layer of each kind that the model has; it is run again with a layer more, with more calibration batches, and, for
    passes that learn, for more steps. Its files lie where the result is to be, and are removed.

    Args:
        gm: the captured graph, which is left as it was.
        ctx: as of the compile.
        out: the folder that the result goes to; None if it is not known.

    Returns:
        The estimate; None, with a note, for a model that has no three layers to tell it from.

    Raises:
        DataError: too little disk or memory is free.
        FxpressError: what the compile itself would fail with.
    """
    started = time.perf_counter()
    known, whole = kinds(gm), gm
    if not known:  # their linears may be spelled in another way
        whole = edit.copied(gm)
        canonicalize(whole)
        known = kinds(whole)
    if not known or len(known[0].places) < 2 or sum(len(kind.places) for kind in known) < 3:
        ctx.notes.append("pre-flight: none, the model has too few layers that add to one stream")
        return None
    most = max(map(learns, pipeline), default=0)
    sizes = _Sizes.of(known, len(ctx.calibration), most)
    ctx.progress.say(f"pre-flight: {len(sizes.places)} of {sizes.layers} layers through all of it")
    folder = existing(out.absolute().parent) if out else Path(tempfile.gettempdir())
    prefix = f"{beside(out, PARTIAL).name}-" if out else "fxpress-"
    with refused_in_words(folder), tempfile.TemporaryDirectory(dir=folder, prefix=prefix) as place:
        steps, first, second = _run(sizes, whole, pipeline, ctx, target, Path(place))
    written, scratch = (
        round(a + max(b - a, 0) * sizes.more) for a, b in ((first.written, second.written), (first.scratch, second.scratch))
    )
    give_back()
    found = Estimate(tuple(steps), written, scratch, memory(), sizes.layers, len(sizes.places), time.perf_counter() - started)
    check_room(found, ctx, out)
    return found


def _run(
    sizes: _Sizes, gm: GraphModule, pipeline: Pipeline, ctx: Context, target: Backend, place: Path
) -> tuple[list[Step], Rehearsal, Rehearsal]:
    """All rehearsals: what each step takes, and the rehearsals that differ in a layer."""
    (least, most), (short, long) = sizes.batches, sizes.steps

    def run(places: tuple[int, ...], batches: int, steps: int) -> Rehearsal:
        return rehearse(gm, pipeline, ctx, target, Size(places, batches, steps), place)

    started = time.perf_counter()
    first = run(sizes.places, least, short)
    if time.perf_counter() - started < QUICK:
        first = run(sizes.places, least, short)
    second = run(tuple(sorted((*sizes.places, sizes.another))), least, short)
    layers = Axis(second, len(sizes.places), 1, sizes.more)
    longer = run(sizes.places, most, short) if most > least else first
    batches = Axis(longer, least, max(most - least, 1), len(ctx.calibration) - least)
    counts = [learns(step) for step in pipeline]
    learned = Axis(run(sizes.places, least, long), short, long - short, 0) if long > short else None
    names = [*map(str, pipeline), CHECKS, f"lower to {target.name}", WRITE]
    return estimate(names, first, layers, batches, learned, counts), first, second
