"""`Quantizer`: our pipelines as a plug-in of `transformers.exporters`, for `DynamoConfig(quantizer=...)` and `OnnxConfig(quantizer=...)`.

The exporter traces the model, hands over the graph, and traces what it gets back once more. For ONNX it then calls `torch.onnx.export`,
which knows none of our operators: for graphs that this plug-in made, the backend `onnx` takes its place, as in `passes.compile`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers import ExportQuantizer
from transformers.exporters.utils import register_patch

from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.flatten import flatten, input_names, output_names
from ir.signature import Signature
from passes import registry
from passes.backend import Backend, Executable
from passes.base import Pass
from passes.driver import compile
from passes.pipeline import Pipeline
from passes.progress import Progress
from passes.quantize_cache import QuantizeCache
from passes.report import Report

BACKENDS = {ExportFormat.DYNAMO: "reference", ExportFormat.ONNX: "onnx"}
MARK = "fxpress.exporters"  # the entry of `node.meta["custom"]`, which survives tracing, on every call of a graph that we made


class Quantizer(ExportQuantizer):  # type: ignore[misc]
    """Run a pipeline on the graph of an export.

    Args:
        pipeline: a preset's name or pipeline text, or passes, as of `passes.compile`.
        calibration: batches: dicts of inputs, or token tensors. For `export_for_generation` they are what `generate` takes.
        seed: of everything random.
        allow_partial: leave layers that the target does not support as they are, instead of refusing.
        progress: how to show it.

    Attributes:
        reports: one for every graph that was exported, in order.

    Raises:
        OptionError: malformed pipelines, and those that quantize the cache: an export's inputs are the model's own.
    """

    quantizes_fx_graph = True
    supported_formats = tuple(BACKENDS)

    def __init__(
        self,
        pipeline: str | Pass | Iterable[Pass] = "w4a16",
        calibration: Iterable[Any] | None = None,
        *,
        seed: int = 0,
        allow_partial: bool = False,
        progress: Progress | None = None,
    ) -> None:
        batches = None if calibration is None else [{"input_ids": b} if isinstance(b, Tensor) else b for b in calibration]
        super().__init__(batches)
        self.pipeline = Pipeline.of(pipeline)
        if any(isinstance(step, QuantizeCache) for step in self.pipeline):
            raise OptionError(
                "an exported graph takes the model's own cache, not a quantized one",
                where=str(self.pipeline),
                remedy="leave quantize_cache out, or use passes.compile",
            )
        self.seed, self.allow_partial, self.progress = seed, allow_partial, progress
        self.reports: list[Report] = []

    def quantize(self, model: GraphModule, sample_inputs: Mapping[str, Any], export_format: ExportFormat) -> GraphModule:
        """The graph after the pipeline, called like `model`.

        Args:
            model: the exporter's graph, with the structures of inputs and outputs that it was traced with.
            sample_inputs: the inputs it was traced with.
            export_format: dynamo or onnx.

        Raises:
            FxpressError: as of `passes.compile`; an `OptionError` if sizes are fixed, or if the pipeline changes what the graph takes in.
        """
        codegen: Any = model.graph._codegen
        gm = _flat(model, sample_inputs, codegen.pytree_info.out_spec)
        signature: Signature = gm.meta["signature"]
        _require_dynamic(signature)
        batches = self.calibration_dataset
        if batches is not None:
            batches = [{name: v for name, v in batch.items() if name in sample_inputs} for batch in batches]
        target = _Supported(registry.backend(BACKENDS[export_format]))
        options: dict[str, Any] = {"seed": self.seed, "allow_partial": self.allow_partial, "progress": self.progress}
        compiled = compile(gm, self.pipeline, batches, target, **options)
        graph = compiled.graph
        assert graph is not None
        if (compiled.signature.inputs, compiled.signature.outputs) != (signature.inputs, signature.outputs):
            raise OptionError(
                "the pipeline changes what the graph takes in or gives out; the exporter traces it with the model's own inputs again",
                where=str(self.pipeline),
                remedy="leave passes that drop heads or layers out, or use passes.compile",
            )
        self.reports.append(compiled.report())
        for node in graph.graph.nodes:
            node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: True}
        graph.graph.set_codegen(codegen)
        graph.recompile()
        return graph


@dataclass(frozen=True)
class _Supported:
    """A backend that refuses what `target` does, and leaves the lowering to the exporter, which first traces the graph once more."""

    target: Backend

    @property
    def name(self) -> str:
        return self.target.name

    def supports(self, operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
        return self.target.supports(operator, encodings, shape)

    def lower(self, gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> Executable:
        return registry.backend("reference").lower(gm, probe, notes)

    def load(self, directory: Path) -> Executable:
        return self.target.load(directory)


def _flat(model: torch.nn.Module, inputs: Mapping[str, Any], structure: pytree.TreeSpec) -> GraphModule:
    """The exporter's graph in flat form."""
    leaves = pytree.tree_leaves(dict(inputs))
    strange = [name for name, v in inputs.items() if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(v))]
    if strange:
        raise DataError(f"the sample inputs {strange} are not tensors", remedy="leave them out of the sample inputs")
    names = input_names(inputs)
    output_class, outputs = output_names(structure)
    return flatten(model, names, outputs, leaves, output_class, [name for name in names if "." not in name])


def _require_dynamic(signature: Signature) -> None:
    """Refuse graphs with a fixed batch or length: they cannot be checked and calibrated on other inputs than the sample."""
    for port in signature.inputs:
        if port.name == "input_ids" and any(size is not None for size in port.shape):
            raise OptionError(
                f"the export's input_ids have fixed sizes, {list(port.shape)}",
                remedy="export with dynamic=True, or dynamic_shapes, and with sample inputs of at least two rows and two tokens",
            )


def _take_the_place(original: Callable[..., Any]) -> Callable[..., Any]:
    """Lower the graphs that `Quantizer` made by the backend `onnx`; installed while the ONNX exporter runs."""

    @functools.wraps(original)
    def export(program: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(program, ExportedProgram) or not _marked(program):
            return original(program, *args, **kwargs)
        structure = program.call_spec.out_spec
        assert structure is not None
        gm = _flat(program.module(check_guards=False), kwargs["kwargs"], structure)
        for node in gm.graph.nodes:
            node.meta.get("custom", {}).pop(MARK, None)
        backend: Any = registry.backend(BACKENDS[ExportFormat.ONNX])
        if kwargs.get("opset_version") is not None:
            backend = replace(backend, opset=kwargs["opset_version"])
        model = backend.lower(gm, gm.meta["example"], []).model()
        for v, name in zip(model.graph.inputs, kwargs["input_names"], strict=True):
            v.name = name
        return torch.onnx.ONNXProgram(model, program)

    return export


register_patch("onnx", "torch.onnx.export")(_take_the_place)


def _marked(program: ExportedProgram) -> bool:
    return any(MARK in (node.meta.get("custom") or {}) for node in program.graph.nodes)
