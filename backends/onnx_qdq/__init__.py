"""The backend `onnx`: quantized graphs as standard QuantizeLinear/DequantizeLinear models that ONNX Runtime fuses, proven on a probe."""

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from backends.onnx_qdq.forms import refusal
from backends.onnx_qdq.package import OnnxExecutable
from ir.encoding import Encoding
from ir.errors import OptionError

__all__ = ["OnnxExecutable", "OnnxQdq"]

OPSETS = (21, 22, 23, 24, 25)
ACCURACY_LEVELS = (0, 1, 4)
DTYPES = ("float32",)
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class OnnxQdq:
    """Lower graphs to ONNX Runtime's CPU provider.

    Args:
        opset: 21 to 25; from 23 on attention and RMS norms are single operators. Two-bit weights raise it to 25.
        accuracy_level: 4 multiplies blocked weights by activations that are rounded to 8 bits per block (fast); 1 multiplies in float32.
        dtype: the dtype of everything that is not quantized.
        signed: whether integer products store signed weights; None: signed where the processor multiplies bytes exactly (VNNI, Arm),
            unsigned where signed kernels saturate. Every file runs exactly on every processor in sessions that `load` opens.
        whole: the greatest size of weights, "1GB", "500MB", up to which a model is checked as a whole; larger ones block by block.
        threads: threads within an operator; 0 leaves it to ONNX Runtime.
    """

    opset: int = 23
    accuracy_level: int = 4
    dtype: str = "float32"
    signed: bool | None = None
    whole: str = "1GB"
    threads: int = 0

    name = "onnx"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {"opset": OPSETS, "accuracy_level": ACCURACY_LEVELS, "dtype": DTYPES}
        for option, values in allowed.items():
            if getattr(self, option) not in values:
                raise OptionError(f"{option}={getattr(self, option)!r} is not one of {list(values)}", where="backend onnx")
        if not re.fullmatch(r"\d+[KMG]B", str(self.whole)):
            raise OptionError(f"whole={self.whole!r} is no size", where="backend onnx", remedy="write for example '1GB' or '500MB'")

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        """Why a `Linear`, `Embedding` or `Cache` of this shape cannot be lowered with these encodings; None if it can."""
        return refusal(operator, encodings, shape)

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> OnnxExecutable:
        """An executable that was checked against `gm` on the flat inputs `probe`; remarks for the user are appended to `notes`.

        Raises:
            BackendError: a site without a form, an operator without an ONNX form, a site that ONNX Runtime does not fuse, or outputs that
                differ from those of `gm`.
        """
        from backends.onnx_qdq.lower import lower  # noqa: PLC0415 (the exporter is heavy)

        return lower(self, gm, probe, notes)

    def load(self, directory: str | Path) -> OnnxExecutable:
        """The executable that was saved in `directory`."""
        return OnnxExecutable.load(directory, threads=self.threads)

    @property
    def whole_bytes(self) -> int:
        """`whole` in bytes."""
        return int(self.whole[:-2]) * UNITS[self.whole[-2]]

    @property
    def signed_weights(self) -> bool:
        """Whether integer products store signed weights on this machine."""
        if self.signed is not None:
            return self.signed
        return platform.machine().lower() not in {"x86_64", "amd64"} or _has_vnni()


def _has_vnni() -> bool:
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"))
