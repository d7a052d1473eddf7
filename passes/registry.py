"""Names of passes, presets and backends: the project's own, and third parties' through entry points."""

import importlib
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from ir.errors import OptionError
from passes.base import Pass
from passes.calls import fits, parse_calls

if TYPE_CHECKING:
    from passes.backend import Backend
    from passes.pipeline import Pipeline

BAD_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what makers raise of values that they cannot read
# Where each of the project's own passes is defined, in the order that the documentation lists them.
MODULES = (
    "canonicalize",
    "untie",
    "fold_norm",
    "center_norm",
    "smooth_channels",
    "rotate_channels",
    "balance_channels",
    "learn",
    "sample_text",
    "observe",
    "prune",
    "annotate",
    "split_channels",
    "learn_masks",
    "fit_masks",
    "assign_bits",
    "fit_budget",
    "clip_activations",
    "round_weights",
    "learn_rounding",
    "tune",
    "quantize",
    "quantize_cache",
)


def passes() -> dict[str, type[Pass]]:
    """All passes by name: the project's own, then those of the entry-point group `fxpress.passes`."""
    found: dict[str, type[Pass]] = {}
    for module in MODULES:
        for value in vars(importlib.import_module(f"passes.{module}")).values():
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == f"passes.{module}":
                found[value.name()] = value
    for point in entry_points(group="fxpress.passes"):
        found[point.name] = point.load()
    return found


def presets() -> "dict[str, Callable[..., Pipeline]]":
    """All presets by name: functions of options that return a pipeline."""
    from passes import presets as module  # noqa: PLC0415 (presets are made of pipelines, which look names up here)

    return {name: preset.make for name, preset in module.PRESETS.items()}


def build(name: str, options: dict[str, Any], where: str) -> Pass:
    """The pass or preset called `name`, with options.

    Raises:
        OptionError: no such name, or no such option.
    """
    known: dict[str, Callable[..., Pass]] = {**passes(), **presets()}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        raise OptionError(
            f"there is no pass or preset {name!r}",
            where=where,
            remedy=f"did you mean {close[0]!r}?" if close else f"there are {sorted(known)}",
        )
    parameters = inspect.signature(known[name]).parameters
    for option, value in options.items():
        if option in parameters and not fits(value, parameters[option].default):
            kind = type(parameters[option].default).__name__
            raise OptionError(f"{name}({option}={value!r}): the option is a {kind}", where=where)
    try:
        return known[name](**options)
    except BAD_VALUE as error:
        raise OptionError(f"{name}: {error}", where=where, remedy=f"its options are {', '.join(map(str, parameters.values()))}") from error


def backend(text: str) -> "Backend":
    """The backend of the entry-point group `fxpress.backends` that `text` states: its name, or a call, `onnx(accuracy_level=1)`.

    Raises:
        OptionError: no such backend or option.
    """
    calls = parse_calls(text)
    if len(calls) != 1:
        raise OptionError(f"{text!r} is not one backend", remedy="write for example onnx, or onnx(accuracy_level=1)")
    ((name, options),) = calls
    points: dict[str, EntryPoint] = {point.name: point for point in entry_points(group="fxpress.backends")}
    if name not in points:
        raise OptionError(f"there is no backend {name!r}", remedy=f"there are {sorted(points)}")
    maker = points[name].load()
    try:
        made: Backend = maker(**options)
    except BAD_VALUE as error:
        known = ", ".join(map(str, inspect.signature(maker).parameters.values()))
        raise OptionError(f"{name}: {error}", where="backend", remedy=f"its options are {known}") from error
    return made
