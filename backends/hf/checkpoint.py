"""A graph as a checkpoint of its model's class: names and layers as that class has them, a configuration that fits, logits compared."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.hf.cache import RoundedCache, rounded_cache
from backends.hf.model import allowed, difference, filled, linear_names
from backends.hf.norms import norm_vectors
from backends.hf.quantized import Rounded, remarks, rounded_linears
from backends.hf.schema import Quantization
from backends.hf.shapes import empty, fitting, numbers, parameters, sizes, tied
from backends.hf.survey import WHERE, survey
from backends.hf.writing import named, write_model
from ir import edit, evaluate
from ir.capture import capture
from ir.checkpoints import CONFIG, bounded, check_checkpoint
from ir.deferred import Deferred
from ir.errors import BackendError, DataError, FxpressError
from ir.files import inside
from ir.sites import layers

State = dict[str, Tensor]


class Checkpoint:
    """A graph, and the transformers model that it is, quantized linears in place of the class's own.

    Args:
        gm: the graph.
        model: the model.
        changed: what its configuration states otherwise than before.
        shard: the greatest size of a file of weights.
        cache: how the graph rounds keys and values; None if it does not.
    """

    def __init__(
        self,
        gm: GraphModule,
        model: transformers.PreTrainedModel,
        changed: Mapping[str, Any],
        shard: str = "5GB",
        cache: RoundedCache | None = None,
    ) -> None:
        self.gm, self.model, self.changed, self.shard, self.cache = gm, model, dict(changed), shard, cache
        self.linears = {name: module for name, module in model.named_modules() if isinstance(module, Rounded)}
        schemes = {name: linear.scheme for name, linear in self.linears.items()}
        stated = Quantization.of(schemes, linear_names(model), None if cache is None else cache.arguments)
        self.quantization = stated.to_json() if schemes or cache else None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs, of the graph."""
        return evaluate.run(self.gm, inputs)

    def save(self, directory: Path) -> None:
        """Write `config.json`, `generation_config.json` if the model generates, and safetensors under the names of its class."""
        if self.quantization is not None:
            self.model.config.quantization_config = self.quantization
        write_model(self.model, self.tensors(), directory, self.shard, self.gm.meta.get(edit.STORE))

    def tensors(self) -> dict[str, Deferred]:
        """All that is stored, by name.

        Raises:
            BackendError: the class stores quantized linears in a form that they do not have.
        """
        packed = {f"{name}.{part}": tensor for name, linear in self.linears.items() for part, tensor in linear.tensors()}
        packed |= {name: Deferred.of(scale) for name, scale in (self.cache.tensors() if self.cache else ())}
        return named(self.model, packed)

    def report(self) -> dict[str, Any]:
        """The numbers of the configuration that are new, and what it states of compressed weights."""
        return {"config": self.changed} | ({} if self.quantization is None else {"quantization_config": self.quantization})


def lower(gm: GraphModule, notes: list[str], shard: str = "5GB") -> Checkpoint:
    """The checkpoint of a graph.

    Raises:
        BackendError, CoverageError: there is none.
    """
    survey(gm)
    config, architecture = gm.meta["config"], gm.meta["architecture"]
    original = empty(config, architecture)
    known = parameters(original)
    floats = {name: tensor for name, tensor in _stored(gm).items() if name in known}  # tables follow from the configuration
    floats |= {name: tensor for name, tensor in norm_vectors(gm, original, floats).items() if name in known}
    dtype = next(iter(floats.values())).dtype
    rounded, cache = rounded_linears(gm, dtype), rounded_cache(gm, original, dtype)
    wanted = sizes(floats) | {f"{name}.weight": linear.shape for name, linear in rounded.items()}
    left = _left(known, wanted)
    state = {_renumbered(name, left): tensor for name, tensor in floats.items()}
    linears = {_renumbered(name, left): linear for name, linear in rounded.items()}
    cache = cache and cache.renamed(lambda path: _renumbered(path, left))
    asked = copy.deepcopy(config)
    asked.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False)) and _still_tied(original, floats, rounded)
    failure = "no configuration of the class has its shapes"
    for fitted in fitting(asked, architecture, {_renumbered(name, left): shape for name, shape in wanted.items()}, left):
        model = filled(fitted, architecture, state, linears, dtype, gm.meta.get("generation"))
        if cache:
            cache.attach(model)
        found = difference(gm, model)
        if found < allowed(dtype, linears, cache):
            changed = _new(config, fitted)
            notes.append(f"hf: {architecture} with {changed or 'its own configuration'}; its logits differ by {found:.1e}")
            notes += remarks(linears) + (cache.remarks() if cache else [])
            made = Checkpoint(gm, model, changed, shard, cache)
            made.tensors()  # refuses now what could not be saved
            return made
        failure = f"with its shapes the class gives other logits (relative difference {found:.1e})"
    missing = set() if left else {name for name, names in tied(original).items() if names.isdisjoint(wanted)}
    raise _refusal(architecture, failure, missing, _surplus(gm, known))


def load(directory: Path) -> Checkpoint:
    """The model saved in a folder.

    Raises:
        DataError: it is none of transformers' own.
    """
    check_checkpoint(inside(directory, CONFIG).parent)
    try:
        with bounded(directory):
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
            architecture = (config.architectures or [""])[0]
            if not issubclass(getattr(transformers, architecture), transformers.PreTrainedModel):
                raise DataError(f"{architecture} is no class of models", where=str(directory))
            empty(config, architecture)
        stated = getattr(config, "quantization_config", None)
        if stated is None:
            model, cache = getattr(transformers, architecture).from_pretrained(directory, trust_remote_code=False).eval(), None
        else:
            model, cache = _compressed(directory, config, architecture, Quantization.model_validate(stated))
        gm = capture(model)
        if cache is not None:
            cache.recode(gm)
        return Checkpoint(gm, model, {}, cache=cache)
    except FxpressError:
        raise
    except Exception as error:  # whatever a class says of a configuration and of tensors that it did not expect
        raise DataError(f"not a folder with a model of transformers: {error}", where=str(directory)) from error


def _compressed(
    directory: Path, config: Any, architecture: str, stated: Quantization
) -> tuple[transformers.PreTrainedModel, RoundedCache | None]:
    """The model of a compressed checkpoint that `Checkpoint.save` wrote, and its cache if that is rounded."""
    del config.quantization_config
    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    described = empty(config, architecture)
    cache = RoundedCache.read(stated.kv_cache_scheme, described, state) if stated.kv_cache_scheme else None
    parts: dict[str, State] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".")
        parts.setdefault(name, {})[part] = tensor
    linears: dict[str, Rounded] = {}
    for name, scheme in stated.schemes(linear_names(described)).items():
        own = {part: state.pop(f"{name}.{part}") for part in parts.pop(name, {}) if part != "bias"}
        linears[name] = Rounded.read(scheme, own)
        if linears[name].shape != tuple(described.get_submodule(name).weight.shape):
            raise DataError(f"{name} has weights of the shape {list(linears[name].shape)}", where=str(directory))
    there = state.keys() | {f"{name}.weight" for name in linears}
    missing = sorted(name for name, names in tied(described).items() if names.isdisjoint(there))
    if missing:
        raise DataError(f"{missing[0]} is missing", where=str(directory))
    generation = None
    if (directory / "generation_config.json").is_file():
        generation = transformers.GenerationConfig.from_pretrained(directory)
    return filled(config, architecture, state, linears, config.dtype, generation), cache


def _new(config: Any, fitted: Any) -> dict[str, Any]:
    """What a configuration states otherwise than the model's own."""
    before = config.to_dict()
    return {field: value for field, value in fitted.to_dict().items() if field != "dtype" and value != before.get(field)}


def _surplus(gm: GraphModule, known: Mapping[str, Any]) -> list[str]:
    """Biases that passes gave to linears of which the class has none."""
    names = ((layer.path, layer.node.args[2:3]) for layer in layers(gm) if layer.kind == "Linear")
    return [f"{path}.bias" for path, given in names if any(given) and f"{path.partition('#')[0]}.bias" not in known]


def _refusal(architecture: str, tried: str, missing: set[str], surplus: list[str]) -> BackendError:
    lacking = f"; it has no {min(missing)}" if missing else f"; the class has no {surplus[0]}" if surplus else ""
    return BackendError(
        f"the graph is no {architecture} any more: {tried}{lacking}",
        where=WHERE,
        remedy="prune with uniform=True and bias=False, leave out passes that fold the biases or means of layer norms, or split weights "
        "(fold_norm, center_norm, split_channels), keep sizes that the class allows (it may want hidden sizes that heads divide); or use "
        "backend='onnx'",
    )


def _stored(gm: GraphModule) -> State:
    """All tensors of a graph, parameters that `canonicalize` computed gains from as they were, unless a gain has changed since."""
    state = {str(node.target): edit.attribute(gm, node).detach() for node in gm.graph.find_nodes(op="get_attr")}
    for gain, (name, parameter, computed) in gm.meta.get("computed", {}).items():
        if gain in state and torch.equal(state.pop(gain), computed):
            state[name] = parameter
    for layer in layers(gm):
        given = layer.node.args[2] if layer.kind == "Linear" and len(layer.node.args) > 2 else None
        if isinstance(given, Node) and given.op == "get_attr":
            state[f"{layer.path}.bias"] = edit.attribute(gm, given).detach()  # whatever a pass called it
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


def _still_tied(model: transformers.PreTrainedModel, stored: State, rounded: Iterable[str]) -> bool:
    """Whether tensors that have several names are one still, or equal ones."""
    for names in tied(model).values():
        if len(names) > 1 and any(f"{name}.weight" in names for name in rounded):
            return False
        first, *others = [stored[name] for name in names if name in stored] or [torch.empty(0)]
        if any(not torch.equal(first, other) for other in others):
            return False
    return True
