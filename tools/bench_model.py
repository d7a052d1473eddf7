"""The bench folder of accuracy figures: `protocol.py` (windows and perplexity) and `llama-wt2`, a trained model."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

FULL = (46.87, 44.93)  # perplexities of the model as it is, WikiText-2 and news


@dataclass(frozen=True)
class BenchModel:
    """A model, calibration batches of 8 windows, and the windows of both texts; nothing is chosen on these."""

    model: transformers.PreTrainedModel
    calibration: list[Tensor]
    tests: dict[str, Tensor]
    protocol: Any

    def perplexities(self, run: Callable[..., Any]) -> list[float]:
        """Of a model, or what was compiled from it, on WikiText-2 and on news."""
        return [self.protocol.perplexity(run, ids) for ids in self.tests.values()]


def load(folder: Path, seed: int = 0) -> BenchModel:
    """The folder's model, and the calibration windows that a seed draws."""
    spec = importlib.util.spec_from_file_location("protocol", folder / "protocol.py")
    assert spec is not None and spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama-wt2", dtype=torch.float32).eval()
    tests = {name: protocol.test_windows(name) for name in protocol.TESTS}
    return BenchModel(model, list(protocol.calibration_windows(seed).split(8)), tests, protocol)


def excess(found: Sequence[float], digits: int = 4, whole: Sequence[float] = FULL) -> str:
    """The logarithms of perplexities over those of full precision, nats a token."""
    return " / ".join(f"{math.log(mine / full):.{digits}f}" for mine, full in zip(found, whole, strict=True))


def report(head: str, sections: Mapping[str, tuple[str, Callable[[], list[str]]]], wanted: Iterable[str], out: Path | None) -> None:
    """Run the sections that are wanted, each under its title; the file is written anew after each: a run that is cut leaves what it has."""
    text = [head]
    for key in wanted:
        title, run = sections[key]
        text += [f"## {title}\n", *run(), ""]
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(text), encoding="utf-8")
