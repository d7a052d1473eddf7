"""`Results`: what passes have already computed, by what it depends on, so that a compile goes on where an earlier one was killed.

Passes are replayed; what is expensive in them is kept. The key of a result is a chain: the captured graph, weights, calibration data,
seed and versions, then every step of the pipeline. What a pass of somebody else has done has no text that tells all, so after it the chain
begins anew at the contents of the graph.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit
from ir.errors import DataError
from ir.text import graph_text
from passes.calls import call_text
from passes.memo.folder import DAMAGE, Memo, Tensors
from passes.memo.loops import State
from passes.memo.packed import Form, same_kind
from passes.memo.slot import Slot
from passes.ranks import Ranks
from passes.recipe import calibration_fingerprint, fingerprint, weights_fingerprint

if TYPE_CHECKING:
    from passes.base import Context, Pass

T = TypeVar("T")


class Results:
    """What the step of a pipeline that runs now has computed before; nothing, if there is no memo.

    Args:
        memo: where results are kept.
        of: what the compile is, for `fxpress cache`.
        ranks: the processes of the compile: what the first one finds all get, and it alone keeps what all have made.
    """

    def __init__(self, memo: Memo | None = None, of: str = "", ranks: Ranks | None = None) -> None:
        self.memo, self.what_for, self.ranks = memo, of, ranks or Ranks()
        self.base = self.chain = self.step = ""
        self.name, self.here = "", False
        self.asked = self.found = 0
        self.scope: list[str] = []
        self.counts: dict[str, int] = {}
        self.slots: list[Slot] = []

    def begin(self, gm: GraphModule, ctx: "Context", marks: tuple[str, str] | None = None) -> None:
        """Begin the chain with what the compile is given: the captured graph, the data, the options of the compile, versions, the machine.

        Args:
            marks: fingerprints of weights and calibration data, where they are known.
        """
        if self.memo is None:
            return
        paths = [edit.module_path(node) for node in gm.graph.nodes]
        signature = gm.meta.get("signature")
        machine = (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())  # sums depend on both in the last bit
        given = (paths, None if signature is None else signature.to_json(), ctx.seed, ctx.allow_partial, machine, *_versions())
        self.base = _digest(_contents(gm, ctx, marks), *map(str, given))
        self.chain = self.base

    @contextmanager
    def during(self, step: "Pass", gm: GraphModule, ctx: "Context") -> Iterator[None]:
        """Around a step of the pipeline: results that are asked for are its own."""
        if self.memo is None or not self.base:
            yield
            return
        asks = step.targeted or not _ours(step)
        self.here = _ours(step) and (not step.targeted or ctx.backend is None or _ours(ctx.backend, "backends"))
        backend = call_text(ctx.backend.name, ctx.backend) if asks and ctx.backend is not None else ""
        self.step, self.name = _digest(self.chain, str(step), _files(step), backend), step.name()
        self.asked, self.found, self.counts = 0, 0, {}
        try:
            yield
        finally:
            self.here = False
            ctx.notes += self.memo.remarks()
        for slot in self.slots:
            slot.drop()
        self.slots.clear()
        if self.found:
            ctx.notes.append(f"{self.name}: {self.found} of {self.asked} results came from the cache; its seconds are those of the rest")
        changed = step.effect.value not in {"observe", "annotate"}
        if not _ours(step) or (step.targeted and changed):
            self.chain = _digest(self.base, _contents(gm, ctx))
        else:
            self.chain = _digest(self.chain, str(step), _files(step), "" if changed else graph_text(gm))

    def kept(self, name: str, make: Callable[[], T], form: Form[T], *, own: bool = False) -> T:
        """A result that was kept, or what `make` gives, which is.

        Names may repeat: a result is known by how often its name was asked for, within the result that is being made. So the order in which
        a pass asks must not depend on what was found.

        Args:
            name: of the result within the step.
            make: what computes it; results that it asks for are parts of this one, and loops within it are over when it is kept.
            form: how it is a dict of tensors.
            own: each process has another one, made without the others, and keeps it.
        """
        if not self.here or self.memo is None:
            return make()
        key, what = self._key(self._own(name) if own else name)
        self.asked += 1
        held = self.memo.get(key) if own or self.ranks.first else None
        held = held if own else self.ranks.given(held)
        if held is not None:
            try:
                value = form.restore(held)
                self.found += 1
                return value
            except (DataError, *DAMAGE):
                if own or self.ranks.first:
                    self.memo.damaged(key)
        first = len(self.slots)
        self.scope.append(what)
        try:
            value = make()
        finally:
            self.scope.pop()
        if own or self.ranks.first:
            self.memo.put(key, form.store(value), f"{self.name}: {name}", self.what_for)
        for slot in self.slots[first:]:
            slot.drop()
        del self.slots[first:]
        return value

    def filled(self, name: str, tensors: Sequence[Tensor], fill: Callable[[], object]) -> None:
        """Fill tensors in place, as they were kept or by `fill`; as `kept`."""
        whole = list(tensors)

        def restore(held: Tensors) -> None:
            found = [held[str(index)] for index in range(len(whole))]
            for tensor, old in zip(whole, found, strict=True):
                same_kind(tensor, old)
            with torch.no_grad():
                for tensor, old in zip(whole, found, strict=True):
                    tensor.copy_(old)

        def made() -> None:
            fill()

        form: Form[None] = Form(lambda _: {str(index): tensor for index, tensor in enumerate(whole)}, restore)
        self.kept(name, made, form)

    def latest(self, name: str, *, own: bool = False) -> Slot:
        """Where the state of a long loop is kept, each in place of the last; it goes when the result that the loop is part of is kept.

        Args:
            own: as of `kept`.
        """
        memo = self.memo if self.here else None
        key, what = self._key(self._own(name) if own else name) if memo else ("", "")
        slot = Slot(memo, key, what, f"{self.name}: {name}, so far", self.what_for, Ranks() if own else self.ranks)
        if memo:
            self.slots.append(slot)
        return slot

    def steps(self, ctx: "Context", steps: Sequence[int], doing: str, state: State) -> Iterator[int]:
        """The steps of a loop, with a progress bar, from where an earlier run was killed; what belongs to the loop's state is put back.

        Args:
            steps: numbers.
            doing: what the loop is called.
            state: what the loop changes from step to step.
        """
        slot = self.latest(doing)
        done = slot.restored(lambda held: state.restore(held, len(steps))) or 0
        if done:
            ctx.notes.append(f"{self.name}: {doing} went on at step {done + 1} of {len(steps)}")
        for _ in islice(state.samples, done):
            pass
        for index, step in enumerate(ctx.track(steps[done:], doing), done + 1):
            yield step
            if self.memo is not None and index < len(steps):
                slot.put(partial(state.tensors_at, index), self.memo.seconds)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Results within are no part of the one that is being made: it depends on what was found which one asks for them."""
        scope, self.scope = self.scope, []
        try:
            yield
        finally:
            self.scope = scope

    def knows(self, names: Sequence[str]) -> bool:
        """Whether there is an entry for each of some names that are asked for next, each for the first time."""
        memo = self.memo if self.here else None
        return memo is not None and self.ranks.told(lambda: all(memo.has(_digest(self.step, *self.scope, f"{name}#0")) for name in names))

    def _own(self, name: str) -> str:
        return f"{name}, process {self.ranks.rank} of {self.ranks.world}" if self.ranks.world > 1 else name

    def _key(self, name: str) -> tuple[str, str]:
        """The key of a result that is asked for now, and its name among its like."""
        path = json.dumps([*self.scope, name])
        count = self.counts[path] = self.counts.get(path, -1) + 1
        what = f"{name}#{count}"
        return _digest(self.step, *self.scope, what), what


def _ours(value: object, room: str = "passes") -> bool:
    """Whether a pass or a backend is a part of fxpress, so that its text and our version say what it does."""
    return type(value).__module__.partition(".")[0] == room


def _contents(gm: GraphModule, ctx: "Context", marks: tuple[str, str] | None = None) -> str:
    """What the graph, its tensors and the calibration data are now."""
    weights, calibration = marks or (weights_fingerprint(gm), calibration_fingerprint(ctx.calibration))
    statistics = [(f"{site}/{name}", kept) for site, at in (ctx.statistics or {}).items() for name, kept in at.tensors().items()]
    return _digest(graph_text(gm), weights, calibration, calibration_fingerprint([ctx.probe]), fingerprint(sorted(statistics)))


def _files(step: "Pass") -> str:
    """The contents of the files that options name."""
    found: dict[str, Any] = {}
    for option in step.files:
        path = Path(getattr(step, option) or "/nowhere")
        found[option] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return json.dumps(found)


@cache
def _versions() -> tuple[str, str, str]:
    """Of fxpress and torch; of fxpress also what its files say, which change under one version while it is worked on."""
    digest = hashlib.sha256()
    for room in ("ir", "passes"):
        for file in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
            digest.update(file.read_bytes())
    return version("fxpress"), torch.__version__, digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
