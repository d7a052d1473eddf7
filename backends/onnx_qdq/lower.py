"""The lowering itself: legalize, translate, finish, write, prove."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as onir
import torch
from torch import Tensor
from torch.fx import GraphModule

from backends.gate import activations, difference, tolerance, uncoded
from backends.onnx_qdq.finish import finish
from backends.onnx_qdq.forms import SHARED
from backends.onnx_qdq.legal import Lowered
from backends.onnx_qdq.legalize import Options, legalize
from backends.onnx_qdq.package import GENAI, MODEL, PROPERTY, OnnxExecutable, properties_of, write
from backends.onnx_qdq.session import (
    EXACT_LEVEL,
    end_profile,
    open_session,
    require_fused,
    run_flat,
    session_entries,
)
from backends.onnx_qdq.translate import to_onnx
from ir.errors import BackendError
from ir.signature import Signature

if TYPE_CHECKING:
    from backends.onnx_qdq import OnnxQdq


def lower(backend: "OnnxQdq", gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> OnnxExecutable:
    """See `OnnxQdq.lower`."""
    signature: Signature = gm.meta["signature"]
    dtype = getattr(torch, backend.dtype)
    folder = tempfile.TemporaryDirectory(prefix="fxpress-onnx-")
    model, sites = export(gm, Options(dtype, backend.signed_weights), backend.opset, notes, probe)
    path = write(model, Path(folder.name))
    del model  # before sessions open the file: its packed weights are a copy
    saturating = backend.signed_weights and any(site.saturates for site in sites)
    entries = session_entries(backend.accuracy_level, saturating)
    properties = properties_of(signature, entries, gm.meta.get("config"))
    if signature.coded:
        notes.append(f"there is no {GENAI}: onnxruntime-genai knows caches of floats only")
    with torch.no_grad():
        oracle = list(gm(*probe))
    exact = _prove(path, session_entries(EXACT_LEVEL, saturating), backend, gm, probe, oracle)
    if any(site.form is SHARED for site in sites):
        _set_level(path, backend.accuracy_level)
    report, session = _measure(path, entries, backend, sites, signature, probe, oracle, notes)
    properties["report"] = {**report, "probe_difference_exact": exact}
    _annotate(path, properties)
    return OnnxExecutable(path, session, properties, folder)


def export(gm: GraphModule, options: Options, opset: int, notes: list[str], probe: Sequence[Tensor]) -> tuple[onir.Model, list[Lowered]]:
    """The finished ONNX model of a graph in memory, its parameters shared with `gm` where they need no conversion."""
    legal = legalize(gm, options, notes)
    example, signature = gm.meta.get("example") or probe, gm.meta["signature"]
    cast = [x.is_floating_point() and not port.keeps_scales for x, port in zip(example, signature.inputs, strict=True)]
    model = to_onnx(legal.graph, [x.to(options.dtype) if floats else x for x, floats in zip(example, cast, strict=True)], opset)
    finish(model, signature, legal)
    return model, legal.sites


def _prove(
    path: Path, entries: Mapping[str, str], backend: "OnnxQdq", gm: GraphModule, probe: Sequence[Tensor], oracle: Sequence[Tensor]
) -> float:
    """Compare with the oracle in a session without further rounding."""
    session = open_session(path, entries, threads=backend.threads)
    signature: Signature = gm.meta["signature"]
    found = difference(uncoded(signature, run_flat(session, probe)), uncoded(signature, oracle))
    allowed = tolerance(activations(gm), uncoded(signature, oracle))
    if not found <= allowed:
        raise BackendError(
            f"ONNX Runtime's outputs differ from the graph's by {found:.1e} relative on the probe, more than {allowed:.0e}",
            remedy="report the model and the ONNX Runtime version; the reference backend runs the graph itself",
        )
    return found


def _measure(
    path: Path,
    entries: Mapping[str, str],
    backend: "OnnxQdq",
    sites: Sequence[Lowered],
    signature: Signature,
    probe: Sequence[Tensor],
    oracle: Sequence[Tensor],
    notes: list[str],
) -> tuple[dict[str, Any], Any]:
    """Open the session that users get, check what it runs, and describe it."""
    profiled = open_session(path, entries, threads=backend.threads, profile=path.with_name("profile"))
    outputs = run_flat(profiled, probe)
    executed = end_profile(profiled)
    require_fused({site.name: (site.form.fused, site.path) for site in sites}, executed)
    _note_speed(backend, sites, notes)
    return {
        "operators": executed.counts,
        "sites": [_site(site) for site in sites],
        "probe_difference": difference(uncoded(signature, outputs), uncoded(signature, oracle)),
        "accuracy_level": backend.accuracy_level,
        "notes": list(notes),
    }, profiled


def _note_speed(backend: "OnnxQdq", sites: Sequence[Lowered], notes: list[str]) -> None:
    slow = sum(site.form.fused == "MatMulNBits" and site.bits != 4 for site in sites)
    if slow and backend.accuracy_level != 4:
        notes.append(
            f"{slow} sites with 2- or 8-bit blocked weights have fast kernels at accuracy_level=4 only; here they are slower than float32"
        )


def _site(site: Lowered) -> dict[str, Any]:
    return {
        "name": site.name,
        "path": site.path,
        "form": site.form.name,
        "runs": site.form.fused,
        "weight": site.weight,
        "activation": site.activation,
        "stored_bits": site.bits,
    }


def _set_level(path: Path, level: int) -> None:
    """State the accuracy level of products that we write fused, for which sessions have no setting; until now they were exact."""
    model = onir.load(path)
    for node in model.graph:
        if node.op_type == SHARED.fused:
            node.attributes["accuracy_level"] = onir.AttrInt64("accuracy_level", level)
    _rewrite(model, path)


def _annotate(path: Path, properties: dict[str, Any]) -> None:
    """Write what is known about a model into its metadata."""
    model = onir.load(path)
    model.metadata_props[PROPERTY] = json.dumps(properties)
    _rewrite(model, path)


def _rewrite(model: onir.Model, path: Path) -> None:
    """Save a model that was loaded from `path` there; the weights' file is left as it is."""
    scratch = path.with_name(f".{MODEL}")
    onir.save(model, scratch)
    scratch.replace(path)
