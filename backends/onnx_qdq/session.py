"""Run a model in ONNX Runtime and prove what it runs: every site fused as its form promises, outputs equal to the oracle."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from ir.errors import BackendError, DataError

PROVIDERS = ("CPUExecutionProvider",)
LEVEL_KEY = "session.qdq_matmulnbits_accuracy_level"
EXACT_LEVEL = 1
PRECISION_KEY = "session.x64quantprecision"
ENTRIES = {LEVEL_KEY: ("0", "1", "4"), PRECISION_KEY: ("1",)}


def session_entries(accuracy_level: int, saturating: bool = False) -> dict[str, str]:
    """Settings that every session of a model needs.

    Args:
        accuracy_level: of blocked weights.
        saturating: whether the model holds signed 8-bit weights, whose products x86 without VNNI adds with saturation;
            `x64quantprecision` lets ONNX Runtime replace them by unsigned ones there.
    """
    return {LEVEL_KEY: str(accuracy_level)} | ({PRECISION_KEY: "1"} if saturating else {})


def known_entries(stated: Mapping[str, str]) -> dict[str, str]:
    """The settings that a file states, if they are some that `session_entries` makes: others name files that ONNX Runtime writes.

    Raises:
        DataError: they are not.
    """
    for key, value in stated.items():
        if key not in ENTRIES or value not in ENTRIES[key]:
            raise DataError(f"the model asks for the session setting {key}={value!r}", remedy="do not use this model")
    return dict(stated)


def open_session(path: Path, entries: Mapping[str, str], *, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session over a model file on the CPU provider.

    Raises:
        BackendError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(PROVIDERS))
    except Exception as error:  # ONNX Runtime's exceptions share no public base
        lines = str(error).splitlines()
        raise BackendError(f"ONNX Runtime refuses the model: {lines[0] if lines else error}", where=str(path)) from error


def run_flat(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs for flat inputs, in order; inputs are converted to the dtypes that the model takes."""
    feeds = {}
    for port, x in zip(session.get_inputs(), inputs, strict=True):
        dtype = _TORCH_DTYPE.get(port.type, x.dtype)
        feeds[port.name] = x.detach().to("cpu", dtype).contiguous().numpy()
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


_TORCH_DTYPE = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class Executed:
    """The nodes that ONNX Runtime ran in one call, after its own optimizations: operators by node name."""

    operators: Mapping[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes of each operator ran."""
        return dict(sorted(Counter(self.operators.values()).items()))


def end_profile(session: onnxruntime.InferenceSession) -> Executed:
    """Read and delete the profile of a session that was opened with one."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    nodes = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"].get("node_index", "") + event["name"].removesuffix("_kernel_time")] = event["args"]["op_name"]
    return Executed(nodes)


def require_fused(expected: Mapping[str, tuple[str, str]], executed: Executed) -> None:
    """Check that every site runs as the operator its form promises.

    Args:
        expected: by weight name: the promised operator and the module path.
        executed: what ran.

    Raises:
        BackendError: naming the sites that are not fused.
    """
    left = [name for name in expected if any(node.endswith(f"{name}/DequantizeLinear") for node in executed.operators)]
    promised = Counter(operator for operator, _ in expected.values())
    counts = executed.counts
    short = {operator: count for operator, count in promised.items() if counts.get(operator, 0) < count}
    if left or short:
        found = {operator: counts.get(operator, 0) for operator in promised}
        raise BackendError(
            f"ONNX Runtime did not fuse every quantized operator: promised {dict(promised)}, found {found}; all: {counts}",
            where=", ".join(expected[name][1] for name in left) or "sites unknown",
            remedy="exclude these modules, choose another group size, or report the ONNX Runtime version",
        )
