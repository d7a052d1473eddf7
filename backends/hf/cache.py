"""Rounded keys and values: as a graph keeps them, as the class's model computes with them, and as a checkpoint states them.

    kv_cache_scheme         in the configuration: how all keys and values are rounded
    PATH.k_scale, .v_scale  their scales in the attention at PATH: [1] for the whole layer, or [heads, 1, 1]

A loader that honours the scheme rounds keys and values as they enter the cache. compressed-tensors does so for modules that it takes for
attention, by the names of their class and of their projections.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backends.hf.schema import CACHES, Arguments, refusal
from ir import edit
from ir.cache import CacheSite, cache_sites, rounded_sites
from ir.cache_code import CacheCode, compute, recode
from ir.encoding import Encoding
from ir.errors import CoverageError, DataError
from ir.packing import per_byte
from ir.sites import layers

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
SCALES = {"key": "k_scale", "value": "v_scale"}
CACHE = "past_key_values"  # the argument of an attention


@dataclass(frozen=True)
class RoundedCache:
    """The cache of a model whose keys and values are all rounded alike.

    Args:
        arguments: how.
        scales: of every attention, by its path and by part, `[1]` or `[heads, 1, 1]`.
    """

    arguments: Arguments
    scales: Mapping[str, Mapping[str, Tensor]]

    def code(self, path: str, part: str, packed: bool = False) -> CacheCode:
        """How one attention keeps its keys or values."""
        return CacheCode(self.arguments.encoding, self.scales[path][part].reshape(1, -1, 1, 1), None, packed)

    def renamed(self, rename: Callable[[str], str]) -> "RoundedCache":
        """The same under other paths."""
        return RoundedCache(self.arguments, {rename(path): parts for path, parts in self.scales.items()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint stores, by the names that it has there."""
        for path, parts in self.scales.items():
            for part, scale in parts.items():
                yield f"{path}.{SCALES[part]}", scale

    @classmethod
    def read(cls, arguments: Arguments, model: nn.Module, state: dict[str, Tensor]) -> "RoundedCache":
        """The inverse of `tensors`, which are taken out of `state`.

        Raises:
            DataError: a scale is missing, or the scheme is none that we write.
        """
        if arguments.dynamic or arguments.strategy not in CACHES.values():
            raise DataError(f"kv_cache_scheme has scales by {arguments.strategy}, dynamic={arguments.dynamic}, which are not read here")
        try:
            scales = {path: {part: state.pop(f"{path}.{name}") for part, name in SCALES.items()} for path in attentions(model)}
        except KeyError as error:
            raise DataError(f"{error.args[0]} is missing") from error
        return cls(arguments, scales)

    def attach(self, model: nn.Module) -> None:
        """Let the attentions of a model round what they give to their cache."""
        for path in self.scales:
            codes = {part: self.code(path, part) for part in SCALES}
            model.get_submodule(path).register_forward_pre_hook(partial(_round_cache, codes), with_kwargs=True)

    def recode(self, gm: GraphModule) -> None:
        """Let a graph that was captured from the class keep its cache so."""
        plan: list[tuple[CacheSite, CacheCode]] = []
        for name, site in cache_sites(gm):
            path = "" if isinstance(site, str) else edit.module_path(site.joined)
            if isinstance(site, str) or path not in self.scales:
                raise DataError(f"{name} of the cache is not kept as the checkpoint states: {site}")
            plan.append((site, self.code(path, site.part, site.width % per_byte(self.arguments.encoding) == 0)))
        recode(gm, plan)
        edit.clean(gm)

    def remarks(self) -> list[str]:
        """What users of a checkpoint should know of its cache."""
        found = ["hf: transformers rounds keys and values of the cache with compressed-tensors, and keeps them in floating point"]
        if (self.arguments.type, self.arguments.strategy) != ("float", "tensor"):
            found.append("hf: vLLM's source names 8-bit floats for a cache, one scale a layer: tensor=True, floats=True; it was not run")
        return found


class _Rounding:
    """Stands in for a cache and rounds what it is given."""

    def __init__(self, cache: Any, codes: Mapping[str, CacheCode]) -> None:
        self.cache, self.codes = cache, codes

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The keys and values that attention reads."""
        key, value = (
            code.decode(code.encode(x, compute), x.dtype, compute) for code, x in zip(self.codes.values(), (key, value), strict=True)
        )
        return (key, value) if self.cache is None else self.cache.update(key, value, *args, **kwargs)


def _round_cache(codes: Mapping[str, CacheCode], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {CACHE: _Rounding(kwargs.get(CACHE), codes)}


def rounded_cache(gm: GraphModule, model: nn.Module, dtype: torch.dtype = torch.float32) -> RoundedCache | None:
    """The cache of a graph; None if it is in floating point.

    Args:
        gm: the graph.
        model: of its class, as captured, on any device.
        dtype: of the model, in which checkpoints have scales.

    Raises:
        CoverageError: a checkpoint cannot state it.
    """
    encodings: dict[str, dict[str, Encoding]] = {}
    scales: dict[str, dict[str, Tensor]] = {}
    for name, node in rounded_sites(gm):
        path, part = edit.module_path(node), name.rpartition(".")[2]
        _, scale, _, text = node.args
        encoding = encodings.setdefault(path, {})[part] = Encoding.parse(str(text))
        if isinstance(scale, Node) and scale.op == "get_attr":
            static = edit.attribute(gm, scale).detach().to(dtype)
            scales.setdefault(path, {})[part] = static.reshape(1 if encoding.block == (-1,) else (-1, 1, 1))
    if not encodings:
        return None
    for path, given in encodings.items():
        if reason := refusal("Cache", given, ()):
            raise _refusal(path, reason)
    there = tuple(f"{path}." for path in attentions(model))
    known = {layer.path.rpartition(".")[0] for layer in layers(gm) if layer.path.startswith(there)}  # layers may be gone
    for path in sorted(known ^ encodings.keys()):
        raise _refusal(path, "it is not rounded, and others are" if path in known else "compressed-tensors does not take it for attention")
    first, encoding = next((path, given["key"]) for path, given in encodings.items())
    for path, given in encodings.items():
        if given["key"] != encoding:
            raise _refusal(path, f"it is {given['key']} and that of {first} {encoding}; checkpoints state one for all")
    return RoundedCache(Arguments.of(encoding, CACHES[encoding.block]), scales)


def attentions(model: nn.Module) -> set[str]:
    """The modules that compressed-tensors takes for attention."""
    named = {name: module for name, module in model.named_modules() if "attention" in type(module).__name__.lower()}
    return {name for name, module in named.items() if any(hasattr(module, projection) for projection in PROJECTIONS)}


def _refusal(path: str, reason: str) -> CoverageError:
    return CoverageError(
        f"the cache of {path} cannot be stored: {reason}", where=path, remedy="leave out quantize_cache, or use backend='onnx'"
    )
