"""Rounded keys and values: as a graph keeps them, as the class's model computes with them, and as a checkpoint states them.

    kv_cache_scheme         in the configuration: how all keys and values are rounded
    PATH.k_scale, .v_scale  their static scales in the attention at PATH: [1] for the whole layer, or [heads, 1, 1]

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

from backends.hf.schema import Arguments, refusal
from ir import edit
from ir.cache import CacheSite, cache_sites, rounded_sites
from ir.cache_code import CacheCode, compute, recode
from ir.encoding import Encoding
from ir.errors import CoverageError, DataError
from ir.packing import per_byte

PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
SCALES = {"key": "k_scale", "value": "v_scale"}
CACHE = "past_key_values"  # the argument of an attention


@dataclass(frozen=True)
class RoundedCache:
    """The cache of a model whose keys and values are all rounded alike.

    Args:
        arguments: how.
        scales: static scales of every attention, by its path and by part, `[1]` or `[heads, 1, 1]`; without parts where they are dynamic.
    """

    arguments: Arguments
    scales: Mapping[str, Mapping[str, Tensor]]

    def code(self, path: str, part: str, packed: bool = False) -> CacheCode:
        """How one attention keeps its keys or values."""
        scale = self.scales[path].get(part)
        return CacheCode(self.arguments.encoding, None if scale is None else scale.reshape(1, -1, 1, 1), None, packed)

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
            DataError: a scale is missing.
        """
        paths = attentions(model)
        if arguments.dynamic:
            return cls(arguments, {path: {} for path in paths})
        try:
            return cls(arguments, {path: {part: state.pop(f"{path}.{name}") for part, name in SCALES.items()} for path in paths})
        except KeyError as error:
            raise DataError(f"{error.args[0]} is missing") from error

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
        if self.arguments.dynamic:
            found.append("hf: it chooses scales of the cache in the model's dtype; here they are kept in float16")
        if self.arguments.type != "float" or self.arguments.dynamic:
            found.append(
                "hf: whether other loaders take this cache was not tried; quantize_cache(dynamic=False, tensor=True, floats=True) is common"
            )
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
    stated: dict[Arguments, str] = {}
    for name, node in rounded_sites(gm):
        path, part = edit.module_path(node), name.rpartition(".")[2]
        x, scale, _, text = node.args
        _, heads, _, width = edit.value(x).shape  # type: ignore[arg-type]
        encoding = encodings.setdefault(path, {})[part] = Encoding.parse(str(text))
        scales.setdefault(path, {})
        if isinstance(scale, Node) and scale.op == "get_attr":
            scales[path][part] = edit.attribute(gm, scale).detach().to(dtype).reshape(1 if encoding.block == (-1,) else (-1, 1, 1))
        if len(encodings[path]) == len(SCALES):
            if reason := refusal("Cache", encodings[path], (int(heads), int(width))):
                raise _refusal(path, reason)
            stated.setdefault(Arguments.of_cache(encoding, int(width)), path)
    if not encodings:
        return None
    known = attentions(model)
    for path in sorted(known ^ encodings.keys()):
        raise _refusal(path, "it is not rounded, and others are" if path in known else "compressed-tensors does not take it for attention")
    alone = [path for path, parts in encodings.items() if len(parts) < len(SCALES)]
    if alone or len(stated) > 1:
        raise _refusal([*alone, *stated.values()][-1], "checkpoints state one encoding for all keys and values")
    return RoundedCache(next(iter(stated)), scales)


def attentions(model: nn.Module) -> set[str]:
    """The modules that compressed-tensors takes for attention."""
    named = {name: module for name, module in model.named_modules() if "attention" in type(module).__name__.lower()}
    return {name for name, module in named.items() if any(hasattr(module, projection) for projection in PROJECTIONS)}


def _refusal(path: str, reason: str) -> CoverageError:
    return CoverageError(
        f"the cache of {path} cannot be stored: {reason}", where=path, remedy="leave out quantize_cache, or use backend='onnx'"
    )
