"""What a backend is to the driver: it says what it supports, lowers a graph to an executable, and loads one from a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir.encoding import Encoding


class Executable(Protocol):
    """A lowered model with flat inputs and outputs, in the order of the graph's signature."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs."""

    def save(self, directory: Path) -> None:
        """Write everything that `Backend.load` needs into an existing, empty folder."""

    def report(self) -> dict[str, Any]:
        """What the backend measured and decided, as plain data."""


@runtime_checkable
class Movable(Protocol):
    """An executable with a choice of devices."""

    @property
    def device(self) -> torch.device:
        """Where it is, and its inputs have to be."""

    def to(self, device: torch.device) -> None:
        """Move it."""


class Backend(Protocol):
    """A target: reference, onnx, hf, or a third party's from the entry-point group `fxpress.backends`."""

    @property
    def name(self) -> str:
        """The name of its entry point."""

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """None if an operator (its class name: "Linear") can have these encodings on its operands, else the reason why not."""

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> Executable:
        """The executable of a quantized graph, checked on the probe inputs.

        Raises:
            BackendError: an operator it cannot lower, or a result that fails a gate.
        """

    def load(self, directory: Path) -> Executable:
        """The executable that was saved in a folder."""


@runtime_checkable
class Surveyor(Protocol):
    """A backend that looks at annotated graphs as wholes too: what single layers cannot tell is refused before any long work as well."""

    def survey(self, gm: GraphModule) -> None:
        """Return if the graph can be lowered once it is quantized as annotated.

        Raises:
            BackendError, CoverageError: it cannot.
        """
