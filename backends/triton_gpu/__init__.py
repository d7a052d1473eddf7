"""The backend `triton`: NVIDIA GPUs run packed low-bit weights through kernels of our own; CPUs run what the kernels mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import GraphModule

from backends.triton_gpu.forms import refusal
from ir.encoding import Encoding

if TYPE_CHECKING:
    from backends.triton_gpu.package import TritonExecutable

__all__ = ["Triton"]


@dataclass(frozen=True)
class Triton:
    """Lower graphs to operators on packed weights of 1 to 8 bits.

    A graph computes in the dtype that its model was loaded in: float16 or bfloat16 for GPUs. It is lowered and loaded on the CPU, where the
    operators' eager bodies run; `compiled.to("cuda")` moves it to where their kernels are.
    """

    name = "triton"

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """Why a `Linear`, `Embedding` or `Cache` of this shape cannot be lowered with these encodings; None if it can."""
        return refusal(operator, encodings, shape)

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> "TritonExecutable":
        """An executable that was checked against `gm` on the flat inputs `probe`; remarks for the user are appended to `notes`.

        Raises:
            BackendError: a weight without a place in the packed layout, arithmetic in float64, or outputs that differ from those of `gm`.
        """
        from backends.triton_gpu.lower import lower  # noqa: PLC0415 (operators are registered when they are needed)

        return lower(gm, probe, notes)

    def load(self, directory: Path) -> "TritonExecutable":
        """The executable that was saved in `directory`, on the CPU.

        Raises:
            DataError: there is none, or its weights are in another version of the layout.
        """
        import backends.triton_gpu.ops.register  # noqa: F401, PLC0415 (as above)
        from backends.triton_gpu.package import TritonExecutable  # noqa: PLC0415

        return TritonExecutable.load(directory)
