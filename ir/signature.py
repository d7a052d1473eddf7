"""`Signature`: what a flat graph's inputs and outputs are called, and how a caller's arguments map onto them.

A graph in normal form takes and returns flat tensors. Their names are dotted paths, `past_key_values.3.value`, that state the structure;
they are the same in every backend and in every saved file. Values that a caller leaves out (attention mask, positions, an empty cache) are
made up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from ir.errors import DataError

CACHE, PRESENT = "past_key_values", "present"  # inputs `past_key_values.0.key`, outputs `present.0.key`
CACHE_PARTS = ("key", "value")
TOKENS = 2  # the axis of a cache [batch, heads, tokens, width] that grows


@dataclass(frozen=True)
class Port:
    """One flat input or output: its dotted name, its dtype as text, and its sizes, None where they vary from call to call."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise DataError(f"{self.dtype!r} is not a dtype", where=self.name)
        return dtype

    @property
    def cached(self) -> bool:
        """Whether it holds a part of the key/value cache."""
        return self.name.startswith((f"{CACHE}.", f"{PRESENT}."))

    @property
    def keeps_scales(self) -> bool:
        """Whether it holds scales of a quantized cache, which keep their dtype whatever the model computes in."""
        return self.cached and self.name.endswith("_scale")

    @classmethod
    def of(cls, name: str, fake: Tensor) -> "Port":
        """The port of a recorded value; a symbol may have been fixed since it was recorded."""
        sizes = [size if isinstance(size, int) else size.node.maybe_as_int() for size in fake.shape]
        return cls(name, str(fake.dtype).removeprefix("torch."), tuple(sizes))


@dataclass(frozen=True)
class Signature:
    """The names of a flat graph's inputs and outputs.

    Args:
        inputs: in the order of the placeholders.
        outputs: in the order of the output node's tuple.
        output_class: the class in `transformers.modeling_outputs` that callers get back; empty for plain modules, which get a tensor, or
            a tuple if there are several.
        positional: names that a caller may pass by position, in order.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    output_class: str = ""
    positional: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """The number of layers that keep a key/value cache."""
        return len({port.name.split(".")[1] for port in self.inputs if port.cached})

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model's: token ids to logits, with a cache."""
        return self.inputs[0].name == "input_ids" and self.outputs[0].name == "logits" and self.layers > 0

    @property
    def coded(self) -> tuple[Port, ...]:
        """The outputs that hold codes, scales and zero points of a quantized cache."""
        return tuple(port for port in self.outputs if port.cached and (port.keeps_scales or not port.torch_dtype.is_floating_point))

    @property
    def token_bytes(self) -> int:
        """Bytes that the cache takes for each token of each row."""
        caches = [port for port in self.inputs if port.cached]
        fixed = (math.prod(size or 1 for axis, size in enumerate(port.shape) if axis not in {0, TOKENS}) for port in caches)
        return sum(size * port.torch_dtype.itemsize for size, port in zip(fixed, caches, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arguments a caller may give, without duplicates, in order."""
        return tuple(dict.fromkeys(port.name.split(".")[0] for port in self.inputs))

    def bind(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The flat inputs for a call, missing ones made up.

        Raises:
            DataError: an unknown name, a missing input that cannot be made up, a wrong dtype or shape.
        """
        if len(args) > len(self.positional):
            raise DataError(f"{len(args)} positional arguments given, the model takes {len(self.positional)}: {list(self.positional)}")
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(self.names))
        if unknown:
            raise DataError(f"unknown inputs {unknown}", where="call of the compiled model", remedy=f"the inputs are {list(self.names)}")
        flat = _flatten_cache(given)
        _check_cache(self, flat)
        made = _defaults(self, flat)
        values = []
        for port in self.inputs:
            value = flat.get(port.name, made.get(port.name))
            if value is None:
                raise DataError(f"input {port.name!r} is missing", remedy=f"the inputs are {list(self.names)}")
            values.append(_checked(port, value))
        return values

    def wrap(self, outputs: Sequence[Tensor]) -> Any:
        """Flat outputs as the structure the model itself returns; a quantized cache as a list of a dict of tensors for each layer."""
        if not self.output_class:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        fields: dict[str, Any] = {port.name: value for port, value in zip(self.outputs, outputs, strict=True) if "." not in port.name}
        layers = self.cache_of(outputs)
        if layers:
            fields[CACHE] = _cache(layers)
        return output_class(self.output_class)(**fields)

    def cache_of(self, outputs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The cache among flat outputs: the parts of each layer by name, as the next call takes them."""
        layers: dict[str, dict[str, Tensor]] = {}
        for port, value in zip(self.outputs, outputs, strict=True):
            if port.cached:
                _, layer, part = port.name.split(".")
                layers.setdefault(layer, {})[part] = value
        return list(layers.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signature":
        """The signature that `to_json` wrote; `ir.stated` reads those of others."""
        ports = {key: tuple(Port(str(p["name"]), str(p["dtype"]), tuple(p["shape"])) for p in data[key]) for key in ("inputs", "outputs")}
        return cls(**ports, output_class=str(data["output_class"]), positional=tuple(map(str, data["positional"])))


def output_class(name: str) -> Any:
    """The class of outputs called `name`; the base of all, where transformers has none."""
    found = getattr(transformers.modeling_outputs, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.utils.ModelOutput)
    return found if known else transformers.utils.ModelOutput


def _cache(layers: list[dict[str, Tensor]]) -> Any:
    """A cache of keys and values as transformers' own, any other as it is."""
    if all(tuple(layer) == CACHE_PARTS and all(kept.is_floating_point() for kept in layer.values()) for layer in layers):
        return transformers.DynamicCache([(layer["key"], layer["value"]) for layer in layers])
    return layers


def _check_cache(signature: Signature, flat: Mapping[str, Tensor]) -> None:
    """Refuse a cache that was given in part, or with more than the model keeps."""
    given = {name for name in flat if name.startswith(f"{CACHE}.")}
    wanted = {port.name for port in signature.inputs if port.cached}
    if given and given != wanted:
        wrong = sorted(wanted - given) or sorted(given - wanted)
        raise DataError(
            f"the cache {'lacks' if wanted - given else 'has a part that the model does not know,'} {wrong[0]!r}",
            remedy="give the past_key_values that the model itself returned",
        )


def _flatten_cache(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arguments by flat name: a cache becomes one entry per tensor, one not yet filled none.

    A cache is an object with layers of keys and values, a list of (key, value) pairs, or a list of dicts of tensors.
    """
    flat: dict[str, Tensor] = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            flat[name] = value
            continue
        pairs = [(layer.keys, layer.values) for layer in value.layers] if hasattr(value, "layers") else value
        if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple | Mapping) for pair in pairs):
            raise DataError(f"input {name!r} is a {type(value).__name__}", remedy="give a tensor, or a cache of keys and values")
        for index, pair in enumerate(pairs):
            named = pair.items() if isinstance(pair, Mapping) else zip(CACHE_PARTS, pair, strict=False)
            parts = {f"{name}.{index}.{part}": part_of for part, part_of in named if part_of is not None}
            if not all(isinstance(tensor, torch.Tensor) for tensor in parts.values()):
                raise DataError(f"input {name!r} holds something else than tensors", remedy="give a tensor, or a cache of keys and values")
            flat |= parts
    return flat


def _defaults(signature: Signature, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that follow from the others: an empty cache, a mask of ones, positions that count the unmasked tokens, segment zero."""
    lead = flat.get("input_ids")
    if lead is None or lead.ndim != 2:
        return {}
    batch, length = lead.shape
    made: dict[str, Tensor] = {}
    past = 0
    for port in signature.inputs:
        if port.cached:
            shape = [batch if axis == 0 else 0 if size is None else size for axis, size in enumerate(port.shape)]
            made[port.name] = torch.zeros(shape, dtype=port.torch_dtype, device=lead.device)
            given = flat.get(port.name)
            past = given.shape[TOKENS] if given is not None else 0
    mask = flat.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + length, dtype=torch.int64, device=lead.device)
    made["attention_mask"] = mask
    if mask.ndim == 2:
        made["position_ids"] = (mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)[:, -length:]
    made["token_type_ids"] = torch.zeros_like(lead)
    return made


def _checked(port: Port, value: Tensor) -> Tensor:
    """`value` if it fits the port; integers of another width are converted."""
    wanted = port.torch_dtype
    if value.ndim != len(port.shape) or any(
        size is not None and size != given for size, given in zip(port.shape, value.shape, strict=True)
    ):
        expected = ["any" if size is None else size for size in port.shape]
        raise DataError(f"input {port.name!r} has shape {list(value.shape)}, expected {expected}")
    if value.dtype != wanted:
        if value.is_floating_point() != wanted.is_floating_point:
            remedy = "give the past_key_values that the model itself returned" if port.cached else ""
            raise DataError(f"input {port.name!r} has dtype {value.dtype}, expected {wanted}", remedy=remedy)
        value = value.to(wanted)
    return value
