"""The lowering itself: legalize, translate, finish, write, prove."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as onir
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.onnx_qdq.cuts import opened, parts, seams
from backends.onnx_qdq.finish import finish
from backends.onnx_qdq.legal import Lowered
from backends.onnx_qdq.legalize import Options, legalize
from backends.onnx_qdq.package import GENAI, PROPERTY, OnnxExecutable, properties_of, weight_bytes, write
from backends.onnx_qdq.proof import Proof, Settings, by_blocks, rewrite, whole
from backends.onnx_qdq.session import EXACT_LEVEL, require_fused, session_entries
from backends.onnx_qdq.translate import to_onnx
from ir.edit import STORE
from ir.signature import Signature

if TYPE_CHECKING:
    from backends.onnx_qdq import OnnxQdq


def lower(backend: "OnnxQdq", gm: GraphModule, probe: Sequence[Tensor], notes: list[str]) -> OnnxExecutable:
    """See `OnnxQdq.lower`."""
    store = gm.meta.get(STORE)
    folder = tempfile.TemporaryDirectory(prefix="fxpress-onnx-", dir=None if store is None else store.folder)
    try:
        return _lower_into(folder, backend, gm, probe, notes)
    except BaseException:
        folder.cleanup()  # whoever holds the traceback would hold the folder
        raise


def _lower_into(
    folder: "tempfile.TemporaryDirectory[str]", backend: "OnnxQdq", gm: GraphModule, probe: Sequence[Tensor], notes: list[str]
) -> OnnxExecutable:
    signature: Signature = gm.meta["signature"]
    store = gm.meta.get(STORE)
    found = parts(gm)
    cuts = seams(found)
    model, sites, names = export(gm, Options(getattr(torch, backend.dtype), backend.signed_weights), backend.opset, notes, probe, cuts)
    path = write(model, Path(folder.name), store)
    del model  # before sessions open the file
    saturating = backend.signed_weights and any(site.saturates for site in sites)
    entries = session_entries(backend.accuracy_level, saturating)
    properties = properties_of(signature, entries, gm.meta.get("config"))
    if signature.coded:
        notes.append(f"there is no {GENAI}: onnxruntime-genai knows caches of floats only")
    settings = Settings(session_entries(EXACT_LEVEL, saturating), entries, backend.accuracy_level, backend.threads)
    if weight_bytes(path) > backend.whole_bytes and len(found) > 1:
        proof = by_blocks(path, settings, gm, probe, found, dict(zip(cuts, names, strict=True)))
        notes.append(f"onnx: compared with the graph in {len(found)} blocks, each by itself: the weights take more than {backend.whole}")
    else:
        proof = whole(path, settings, gm, probe)
    require_fused({site.name: (site.form.fused, site.path) for site in sites}, proof.executed)
    _note_speed(backend, sites, notes)
    properties["report"] = _report(backend, sites, proof, notes)
    _annotate(path, properties)
    return OnnxExecutable(path, properties, proof.session, folder, backend.threads)


def export(
    gm: GraphModule, options: Options, opset: int, notes: list[str], probe: Sequence[Tensor], cuts: Sequence[Node] = ()
) -> tuple[onir.Model, list[Lowered], list[str]]:
    """The finished ONNX model of a graph, whose weights are made when it is written, its sites, and what it calls the values of `cuts`."""
    legal = legalize(opened(gm, cuts), options, notes)
    example, signature = gm.meta.get("example") or probe, gm.meta["signature"]
    cast = [x.is_floating_point() and not port.keeps_scales for x, port in zip(example, signature.inputs, strict=True)]
    model = to_onnx(legal.graph, [x.to(options.dtype) if floats else x for x, floats in zip(example, cast, strict=True)], opset)
    names = finish(model, signature, legal)
    return model, legal.sites, names


def _report(backend: "OnnxQdq", sites: Sequence[Lowered], proof: Proof, notes: Sequence[str]) -> dict[str, Any]:
    """What the gate found."""
    stated = {
        "operators": proof.executed.counts,
        "sites": [_site(site) for site in sites],
        "probe_difference": proof.used,
        "accuracy_level": backend.accuracy_level,
        "notes": list(notes),
        "probe_difference_exact": proof.exact,
    }
    return stated | ({"blocks": proof.blocks} if proof.blocks else {})


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


def _annotate(path: Path, properties: dict[str, Any]) -> None:
    """Write what is known about a model into its metadata."""
    model = onir.load(path)
    model.metadata_props[PROPERTY] = json.dumps(properties)
    rewrite(model, path)
