"""Which configuration of a model's class has given parameters: found by trying its numbers, not by what they are called.

A number is tried with the values that the observed changes of sizes allow: 96 may be 64 where a size went from 96 to 64, 4 may be 2 where
one went from 64 to 32. A configuration fits if the model that it describes, made without memory, has every parameter in its shape.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers

Shapes = Mapping[str, tuple[int, ...]]
Layers = Mapping[str, list[int]]  # numbers of layers, by the path of their list
DEPTH = 4  # how many numbers may be new


def empty(config: Any, architecture: str) -> transformers.PreTrainedModel:
    """The model that a configuration describes, without memory."""
    with torch.device("meta"):
        return getattr(transformers, architecture)._from_config(copy.deepcopy(config))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All by name, under every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False))


def sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def tied(model: torch.nn.Module) -> dict[str, set[str]]:
    """For every parameter all names of its tensor."""
    named = parameters(model)
    names: dict[int, set[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), set()).add(name)
    return {name: names[id(tensor)] for name, tensor in named.items()}


def numbers(names: Iterable[str]) -> dict[str, list[int]]:
    """The numbers in names `path.number.rest`, by path."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:at]), set()).add(int(part))
    return {path: sorted(numbers) for path, numbers in found.items()}


def fitting(config: Any, architecture: str, wanted: Shapes, left: Layers) -> Iterator[Any]:
    """Every configuration whose model has these parameters and no others.

    Args:
        config: the model's own.
        architecture: the name of its class.
        wanted: shapes by name; names that are tied to one of them may be left out.
        left: lists of layers of which some are gone, with the numbers of those that are left; `wanted` counts these anew.
    """
    before = sizes(parameters(empty(config, architecture)))
    lengths = {len(numbers(before)[path]): kept for path, kept in left.items()}

    def search(config: Any, wrong: set[str], depth: int) -> Iterator[Any]:
        if not wrong:
            yield config
            return
        for changed in _changed(config, _pairs(before, wanted, wrong), lengths) if depth else ():
            still = _wrong(changed, architecture, wanted)
            if still is not None and min(wrong) not in still and still < wrong:
                yield from search(changed, still, depth - 1)

    own = _stated(config)
    yield from search(own, _wrong(own, architecture, wanted) or set(), DEPTH)


def _stated(config: Any) -> Any:
    """A configuration that states the size of heads, which would else follow from their number."""
    own = copy.deepcopy(config)
    if getattr(own, "num_attention_heads", 0) and hasattr(own, "hidden_size") and getattr(own, "head_dim", None) is None:
        own.head_dim = own.hidden_size // own.num_attention_heads
    return own


def _wrong(config: Any, architecture: str, wanted: Shapes) -> set[str] | None:
    """The names of parameters that are missing, too many, or of another shape; None if there is no such model."""
    try:
        model = empty(config, architecture)
    except Exception:  # whatever a class says of numbers that do not go together
        return None
    have, names = sizes(parameters(model)), tied(model)
    missing = {name for name in have.keys() - wanted.keys() if names[name].isdisjoint(wanted)}
    return missing | {name for name, shape in wanted.items() if have.get(name) != shape}


def _pairs(before: Shapes, wanted: Shapes, wrong: set[str]) -> set[tuple[int, int]]:
    """Sizes that have changed, before and now."""
    alike = [name for name in wrong if name in wanted and name in before and len(before[name]) == len(wanted[name])]
    return {(old, new) for name in alike for old, new in zip(before[name], wanted[name], strict=True) if old != new}


def _changed(config: Any, pairs: set[tuple[int, int]], lengths: Mapping[int, list[int]]) -> Iterator[Any]:
    """Configurations with one number changed, and with it what is listed for each of so many layers."""
    stated = config.to_dict()
    for field, value in stated.items():
        fewer = {(value, len(lengths[value]))} if isinstance(value, int) and value in lengths else set()
        for new in _values(value, pairs | fewer):
            changed = copy.deepcopy(config)
            try:
                setattr(changed, field, new)
                for other, listed in stated.items() if (value, new) in fewer else ():
                    if isinstance(listed, list) and len(listed) == value:
                        setattr(changed, other, [listed[index] for index in lengths[value]])
            except Exception:  # whatever a class says of a number
                continue
            yield changed


def _values(value: Any, pairs: set[tuple[int, int]]) -> list[int]:
    """What a number may have become."""
    if value is None:
        return sorted({new for _, new in pairs})
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        return []
    return sorted({value * new // old for old, new in pairs if old % value == 0 and value * new % old == 0})
