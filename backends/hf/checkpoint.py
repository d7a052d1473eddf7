"""A graph as a checkpoint of its model's class: names and layers as that class has them, a configuration that fits, logits compared."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule
from transformers.initialization import no_init_weights

from backends.hf.shapes import empty, fitting, numbers, parameters, sizes, tied
from ir import edit
from ir.capture import capture
from ir.errors import BackendError, DataError
from ir.ops import DEQUANTIZE, QUANTIZE
from ir.signature import CACHE, Signature

State = dict[str, Tensor]
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the logits, relative
WHERE = "backend hf"


class Checkpoint:
    """A graph, and the transformers model that it is."""

    def __init__(self, gm: GraphModule, model: transformers.PreTrainedModel, changed: Mapping[str, Any]) -> None:
        self.gm, self.model, self.changed = gm, model, dict(changed)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs, of the graph."""
        outputs: tuple[Tensor, ...] = self.gm(*inputs)
        return outputs

    def save(self, directory: Path) -> None:
        """Write `config.json`, `generation_config.json` if the model generates, and safetensors under the names of its class."""
        self.model.save_pretrained(directory)

    def report(self) -> dict[str, Any]:
        """The numbers of the configuration that are new."""
        return {"config": self.changed}


def lower(gm: GraphModule, notes: list[str]) -> Checkpoint:
    """The checkpoint of a graph.

    Raises:
        BackendError: there is none.
    """
    config, architecture = gm.meta.get("config"), gm.meta.get("architecture", "")
    if config is None or not hasattr(transformers, architecture):
        raise BackendError("the graph is not of a model of transformers", where=WHERE, remedy="use backend='onnx' or 'reference'")
    if any(node.target in {QUANTIZE, DEQUANTIZE} for node in gm.graph.nodes):
        raise BackendError("the graph is quantized", where=WHERE, remedy="use backend='onnx', or a pipeline without quantize")
    original = empty(config, architecture)
    known = parameters(original)
    stored = {name: tensor for name, tensor in _stored(gm).items() if name in known}  # tables follow from the configuration
    left = _left(known, stored)
    state = {_renumbered(name, left): tensor for name, tensor in stored.items()}
    asked = copy.deepcopy(config)
    asked.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False)) and _still_tied(original, stored)
    failure = "no configuration of the class has its shapes"
    for fitted in fitting(asked, architecture, sizes(state), left):
        model = _filled(fitted, architecture, state, gm.meta.get("generation"))
        difference = _difference(gm, model)
        if difference < CLOSE.get(model.dtype, 1e-4):
            changed = _new(config, fitted)
            notes.append(f"hf: {architecture} with {changed or 'its own configuration'}; its logits differ by {difference:.1e}")
            return Checkpoint(gm, model, changed)
        failure = f"with its shapes the class gives other logits (relative difference {difference:.1e})"
    missing = set() if left else {name for name, names in tied(original).items() if names.isdisjoint(stored)}
    raise _refusal(architecture, failure, missing)


def load(directory: Path) -> Checkpoint:
    """The model saved in a folder.

    Raises:
        DataError: it is none of transformers' own.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        model = getattr(transformers, (config.architectures or [""])[0]).from_pretrained(directory).eval()
    except (AttributeError, OSError, ValueError) as error:
        raise DataError(f"not a folder with a model of transformers: {error}", where=str(directory)) from error
    return Checkpoint(capture(model), model, {})


def _new(config: Any, fitted: Any) -> dict[str, Any]:
    """What a configuration states otherwise than the model's own."""
    before = config.to_dict()
    return {field: value for field, value in fitted.to_dict().items() if field != "dtype" and value != before.get(field)}


def _refusal(architecture: str, tried: str, missing: set[str]) -> BackendError:
    lacking = f"; it has no {min(missing)}" if missing else ""
    return BackendError(
        f"the graph is no {architecture} any more: {tried}{lacking}",
        where=WHERE,
        remedy="prune with uniform=True and bias=False, leave out passes that fold, split or rename weights (fold_norm, center_norm, "
        "split_channels), keep sizes that the class allows (it may want hidden sizes that heads divide); or use backend='onnx'",
    )


def _stored(gm: GraphModule) -> State:
    """All tensors of a graph, parameters that `canonicalize` computed gains from as they were.

    Raises:
        BackendError: such a gain has changed since.
    """
    state = {str(node.target): edit.attribute(gm, node).detach() for node in gm.graph.find_nodes(op="get_attr")}
    for gain, (name, parameter, computed) in gm.meta.get("computed", {}).items():
        if gain in state:
            if not torch.equal(state.pop(gain), computed):
                raise BackendError(f"{gain}, computed from {name}, has changed", where=WHERE, remedy="leave out passes that train norms")
            state[name] = parameter
    return state


def _left(known: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, list[int]]:
    """Lists of layers of which some are gone: the numbers that are left, by the list's path."""
    had, kept = numbers(known), numbers(stored)
    return {path: kept[path] for path in had if path in kept and kept[path] != had[path]}


def _renumbered(name: str, left: Mapping[str, list[int]]) -> str:
    """The name that a tensor has when the layers that are left are counted anew."""
    for path, kept in left.items():
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdigit():
            return f"{path}.{kept.index(int(number))}.{rest}"
    return name


def _still_tied(model: transformers.PreTrainedModel, stored: State) -> bool:
    """Whether tensors that have several names are one still, or equal ones."""
    for names in tied(model).values():
        first, *others = [stored[name] for name in names if name in stored] or [torch.empty(0)]
        if any(not torch.equal(first, other) for other in others):
            return False
    return True


def _filled(config: Any, architecture: str, state: State, generation: Any) -> transformers.PreTrainedModel:
    """The model of a configuration with tensors of the graph, which they share."""
    dtype = next(iter(state.values())).dtype
    with no_init_weights():
        model = getattr(transformers, architecture)._from_config(config, dtype=dtype)
    model.load_state_dict(
        {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()}, strict=False, assign=True
    )
    model.tie_weights()
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


@torch.no_grad()
def _difference(gm: GraphModule, model: transformers.PreTrainedModel) -> float:
    """Of the first outputs of graph and model on the example, relative; with a cache over two steps."""
    signature: Signature = gm.meta["signature"]
    given = {port.name: value for port, value in zip(signature.inputs, gm.meta["example"], strict=True) if not port.cached}
    given = {"input_ids": given["input_ids"]} if "input_ids" in given else given
    caches: list[dict[str, Any]] = [{}, {}]
    greatest = 0.0
    for _ in range(2 if signature.causal else 1):
        mine = signature.wrap(gm(*signature.bind(**given, **caches[0])))
        theirs = model(**given, **caches[1])
        a, b = (found[0].double() for found in (mine, theirs))
        greatest = max(greatest, float((a - b).norm() / b.norm().clamp_min(1e-30)))
        caches = [{CACHE: found.get(CACHE)} if CACHE in found else {} for found in (mine, theirs)]
    return greatest
