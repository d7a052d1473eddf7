"""The backend `hf`: graphs as Hugging Face folders, a rewritten configuration and safetensors, that load with no code of ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from ir.encoding import Encoding
from ir.errors import OptionError

if TYPE_CHECKING:
    from backends.hf.checkpoint import Checkpoint

__all__ = ["HuggingFace"]


@dataclass(frozen=True)
class HuggingFace:
    """Save what is still a model of its class: the same layers, all alike, some fewer or narrower.

    Quantized linears are written in the compressed-tensors format, which transformers loads with compressed-tensors installed.

    Args:
        shard: the greatest size of a file of weights: "5GB", "500MB".
    """

    shard: str = "5GB"

    name = "hf"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*[KMG]B", str(self.shard)):
            raise OptionError(f"shard={self.shard!r} is no size", where="backend hf", remedy="write for example '5GB' or '500MB'")

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """Why a `Linear` of this shape cannot be stored with these encodings; None if it can. Nothing else can be quantized."""
        from backends.hf.schema import refusal  # noqa: PLC0415 (pydantic is heavy)

        return refusal(operator, encodings, shape) if encodings else None

    def survey(self, gm: GraphModule) -> None:
        """Refuse an annotated graph that no checkpoint can hold, before any long work.

        Raises:
            BackendError: it is not of a transformers model, or computes what its class does not.
            CoverageError: linears that vLLM joins differ in their schemes, or a layer has none.
        """
        from backends.hf.survey import survey  # noqa: PLC0415 (transformers is heavy)

        survey(gm)

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> "Checkpoint":
        """A checkpoint whose model was filled and compared with `gm`.

        Raises:
            BackendError: the graph is not of a transformers model, or is no model of that class any more.
            CoverageError: a layer is quantized in a way that has no place in a checkpoint.
        """
        from backends.hf.checkpoint import lower  # noqa: PLC0415

        return lower(gm, notes, self.shard)

    def load(self, directory: str | Path) -> Any:
        """The model saved in a folder, captured again."""
        from backends.hf.checkpoint import load  # noqa: PLC0415

        return load(Path(directory))
