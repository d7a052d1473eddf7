"""The front door: `passes.compile(model, pipeline=...)`, `passes.load(folder)`, and what one needs to write a pass."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ir.edit import emit, replace
    from ir.encoding import Encoding
    from ir.errors import FxpressError
    from ir.match import find
    from passes import presets
    from passes.base import Context, Effect, Pass
    from passes.commands.loading import load_model, load_tokenizer
    from passes.compiled import Compiled, load
    from passes.data.calibration import token_windows
    from passes.driver import compile, estimate
    from passes.exporters import Quantizer
    from passes.pipeline import Pipeline
    from passes.ranks import Ranks
    from passes.recipe import Recipe

# Public name: where it is defined. Nothing is imported before it is asked for, so that `fxpress --help` is quick.
_WHERE = {
    "Compiled": "passes.compiled",
    "Context": "passes.base",
    "Effect": "passes.base",
    "Encoding": "ir.encoding",
    "FxpressError": "ir.errors",
    "Pass": "passes.base",
    "Pipeline": "passes.pipeline",
    "Quantizer": "passes.exporters",
    "Ranks": "passes.ranks",
    "Recipe": "passes.recipe",
    "compile": "passes.driver",
    "emit": "ir.edit",
    "estimate": "passes.driver",
    "find": "ir.match",
    "load": "passes.compiled",
    "load_model": "passes.commands.loading",
    "load_tokenizer": "passes.commands.loading",
    "replace": "ir.edit",
    "token_windows": "passes.data.calibration",
}

__all__ = [
    "Compiled",
    "Context",
    "Effect",
    "Encoding",
    "FxpressError",
    "Pass",
    "Pipeline",
    "Quantizer",
    "Ranks",
    "Recipe",
    "compile",
    "emit",
    "estimate",
    "find",
    "load",
    "load_model",
    "load_tokenizer",
    "presets",
    "replace",
    "token_windows",
]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("passes.presets")
    if name not in _WHERE:
        raise AttributeError(f"module 'passes' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
