"""The backend `hf`: graphs as ordinary Hugging Face folders, a rewritten configuration and safetensors, that load with no code of ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from ir.encoding import Encoding

if TYPE_CHECKING:
    from backends.hf.checkpoint import Checkpoint

__all__ = ["HuggingFace"]


@dataclass(frozen=True)
class HuggingFace:
    """Save what is still a model of its class: the same layers, all alike, some fewer or narrower, weights in floating point."""

    name = "hf"

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """Nothing that is rounded, so far."""
        return "the hf backend writes weights in floating point only; backend='onnx' takes quantized ones" if encodings else None

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> "Checkpoint":
        """A checkpoint whose model was loaded and compared with `gm`.

        Raises:
            BackendError: the graph is not of a transformers model, is quantized, or is no model of that class any more.
        """
        from backends.hf.checkpoint import lower  # noqa: PLC0415 (transformers is heavy)

        return lower(gm, notes)

    def load(self, directory: str | Path) -> Any:
        """The model saved in a folder, captured again."""
        from backends.hf.checkpoint import load  # noqa: PLC0415

        return load(Path(directory))
