"""The reference backend: runs the quantize/dequantize graph as it is. It is the oracle that other backends are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit, evaluate
from ir.encoding import Encoding
from ir.place import device_of, place
from ir.serialize import load_graph, save_graph


class ReferenceExecutable:
    """The graph itself, run by torch."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs."""
        return evaluate.run(self.gm, inputs)

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors are."""
        return device_of(self.gm)

    def to(self, device: torch.device) -> None:
        """Move there; `Compiled.graph` stays where it is."""
        self.gm = edit.copied(self.gm)
        place(self.gm, device)

    def save(self, directory: Path) -> None:
        """Write `graph.json` and `weights.safetensors`, codes packed."""
        stored = edit.copied(self.gm)
        place(stored, torch.device("cpu"))
        save_graph(stored, directory)

    def report(self) -> dict[str, Any]:
        """Nothing to add."""
        return {}


@dataclass(frozen=True)
class Reference:
    """Supports every encoding."""

    name = "reference"

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """Everything is supported."""
        return None

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> ReferenceExecutable:
        """The graph as it is."""
        return ReferenceExecutable(gm)

    def load(self, directory: Path) -> ReferenceExecutable:
        """The executable saved in a folder."""
        return ReferenceExecutable(load_graph(directory))
