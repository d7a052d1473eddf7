"""The start of a compile: what was given, captured and checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from ir.capture import capture
from ir.edit import STORE
from ir.errors import DataError, OptionError
from ir.memory import map_large
from ir.signature import Signature
from ir.store import Store
from ir.verify import check_weights, verify
from passes import registry
from passes.backend import Backend
from passes.base import Context, Pass
from passes.data.calibration import flat_batches
from passes.pipeline import Pipeline
from passes.preflight.plan import weight_bytes
from passes.ranks import Ranks
from passes.recipe import Recipe, calibration_fingerprint, versions, weights_fingerprint

PROBE_ROWS, PROBE_LENGTH = 2, 64
LARGE_MODEL = 1 << 27  # bytes of weights, from which on what is freed goes back at once: small ones would take a third longer


@dataclass(frozen=True)
class Start:
    """Everything that was given, checked: what comes next is long work."""

    gm: GraphModule
    steps: Pipeline
    target: Backend
    ctx: Context
    marks: tuple[str, str]  # fingerprints of weights and calibration data


def begin(
    model: nn.Module,
    pipeline: str | Pass | Iterable[Pass] | Recipe,
    calibration: Iterable[Any] | None,
    backend: str | Backend | None,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    seed: int,
    ranks: Ranks | None,
    scratch: str | Path | None,
) -> Start:
    """Capture a model and check it, the data and the recipe; all processes must have been given the same.

    Raises:
        FxpressError: what is bad of what was given.
    """
    recipe = pipeline if isinstance(pipeline, Recipe) else None
    backend = backend or (recipe.backend if recipe else "reference")
    target: Backend = registry.backend(backend) if isinstance(backend, str) else backend
    steps = Pipeline.of(recipe.pipeline if recipe else pipeline)  # type: ignore[arg-type]
    if recipe:
        recipe.check_files(steps)
    if not steps.passes:
        raise OptionError("the pipeline is empty", remedy="name a preset, w4a16, or passes")
    if scratch is not None and not Path(scratch).is_dir():
        raise DataError("there is no such folder", where=f"scratch={str(scratch)!r}", remedy="make it, or name another one")
    gm = capture(model, args, kwargs)
    if scratch is not None:
        known: Store | None = gm.meta.get(STORE)
        gm.meta[STORE] = known.moved(scratch) if known else Store(scratch)
    verify(gm, stage="capture")
    check_weights(gm)
    if weight_bytes(gm) >= LARGE_MODEL:
        map_large()
    batches = flat_batches(gm, calibration)
    marks = (weights_fingerprint(gm), calibration_fingerprint(batches))
    ranks = ranks or Ranks()
    ranks.agree([str(steps), *marks, seed, versions()], "pipeline, model, calibration data, seed or version")
    if recipe:
        recipe.check(*marks)
        seed = recipe.seed
    example: list[Tensor] = gm.meta["example"]
    ctx = Context(batches, _probe(gm, batches) or example, seed, backend=target, ranks=ranks)
    return Start(gm, steps, target, ctx, marks)


def _probe(gm: GraphModule, batches: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """A small part of the first calibration batch, or all of it where inputs beside the tokens cannot be made up; None without any."""
    if not batches:
        return None
    signature: Signature = gm.meta["signature"]
    tokens = batches[0][0]
    if signature.inputs[0].name != "input_ids" or tokens.ndim != 2:
        return list(batches[0])
    try:
        return signature.bind(input_ids=tokens[:PROBE_ROWS, :PROBE_LENGTH])
    except DataError:
        return list(batches[0])
