"""What keeps a graph from becoming a checkpoint of its class, told from its annotations, before any long work."""

from collections.abc import Iterator

import transformers
from torch import nn
from torch.fx import GraphModule, Node

from backends.hf.cache import rounded_cache
from backends.hf.schema import Scheme, refusal
from backends.hf.shapes import empty
from ir import edit
from ir.encoding import Encoding
from ir.errors import BackendError, CoverageError
from ir.match import find
from ir.ops import HADAMARD
from ir.sites import QUANTIZABLE, Layer, before_rounding, layers

WHERE = "backend hf"


def survey(gm: GraphModule) -> None:
    """Refuse what no checkpoint can hold.

    Raises:
        BackendError: the graph is not of a transformers model, or computes what its class does not.
        CoverageError: layers are quantized, or annotated, in a way that compressed checkpoints have no place for.
    """
    config, architecture = gm.meta.get("config"), gm.meta.get("architecture", "")
    if config is None or not hasattr(transformers, architecture):
        raise BackendError("the graph is not of a model of transformers", where=WHERE, remedy="use backend='onnx' or 'reference'")
    online = next(iter(find(gm, HADAMARD)), None)
    if online is not None:
        raise BackendError(
            "the graph rotates activations at run time, which no class of transformers does; it leaves out a transform_config that would "
            "state the rotation, so that the folder would compute something else",
            where=edit.module_path(online) or WHERE,
            remedy="rotate offline only, rotate_channels(where=['R1', 'R2']); or use backend='onnx'",
        )
    model = empty(config, architecture)
    rounded_cache(gm, model)
    modules = dict(model.named_modules())
    marked = dict(_encodings(gm))
    for layer, encodings in marked.items():
        _check_layer(layer, encodings, modules)
    _check_fused(gm, marked)


def _encodings(gm: GraphModule) -> Iterator[tuple[Layer, dict[str, Encoding]]]:
    """The encodings that each layer has, or is to get, by operand."""
    for layer in layers(gm):
        found: dict[str, Encoding] = {}
        for name in QUANTIZABLE[layer.node.target][1]:
            stated = layer.site(name).rounded or layer.site(name).encoding
            if stated is not None:
                found[name] = stated
        yield layer, found


def _check_layer(layer: Layer, encodings: dict[str, Encoding], modules: dict[str, nn.Module]) -> None:
    reason = refusal(layer.kind, encodings, tuple(edit.value(layer.weight).shape)) if encodings else None
    kind = type(modules.get(layer.path.partition("#")[0])).__name__
    if encodings and reason is None and kind != "Linear":
        reason = f"it is no module of the class Linear but {kind}"
    if reason is not None:
        raise CoverageError(f"{layer.path} cannot be stored: {reason}", where=layer.path, remedy="ignore the layer, or use backend='onnx'")


def _check_fused(gm: GraphModule, marked: dict[Layer, dict[str, Encoding]]) -> None:
    """Linears of one module that read one tensor (queries, keys and values; gate and up) have one scheme: vLLM makes one linear of them."""
    sets: dict[tuple[Node, str], dict[str, Layer]] = {}
    for layer, encodings in marked.items():
        if layer.kind != "Linear":
            continue
        scheme = ""
        if "weight" in encodings:
            scheme = Scheme.of(encodings["weight"], encodings.get("input"), tuple(edit.value(layer.weight).shape)).model_dump_json()
        key = (before_rounding(layer.site("input").operand), layer.path.rpartition(".")[0])
        sets.setdefault(key, {}).setdefault(scheme, layer)
    for found in sets.values():
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise CoverageError(
                f"{one.path} and {other.path} read one tensor and have different schemes: vLLM joins them to one linear",
                where=one.path,
                remedy="quantize both alike or neither: fused=True in assign_bits, the same in targets and ignore",
            )
