"""Split linears over runs of their input channels: each run becomes a linear of its own, which may be stored in its own way."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.errors import OptionError
from ir.match import aten, is_call
from ir.schemes import change_bits
from ir.sites import KEY, Layer, readers
from ir.weights import unrounded


def splittable(gm: GraphModule) -> dict[Node, list[Layer]]:
    """The annotated linears by the tensor that they read, but for those that read a part of a tensor already.

    Raises:
        OptionError: inputs that are rounded already.
    """
    pending = {layer.node for layer in unrounded(gm)}
    found = {source: [layer for layer in layers if layer.node in pending] for source, layers in readers(gm).items()}
    whole = {source: layers for source, layers in found.items() if layers and not _is_part(source)}
    for layers in whole.values():
        if layers[0].input_rounded:
            raise OptionError("the input is rounded already", where=layers[0].path, remedy="split channels before quantize")
    return whole


def _is_part(source: Node) -> bool:
    """Whether a tensor is stored channels of another one."""
    if not is_call(source, aten.index_select.default):
        return False
    _, axis, channels = source.args
    return axis in {-1, edit.value(source).ndim - 1} and isinstance(channels, Node) and channels.op == "get_attr"


def rows_of(found: Sequence[Layer]) -> int:
    """Rows of all weights that read one tensor: what one channel takes."""
    return sum(int(edit.value(layer.weight).shape[0]) for layer in found)


def split(gm: GraphModule, source: Node, found: Sequence[Layer], parts: Sequence[Tensor]) -> list[list[Node]]:
    """Let linears that read one tensor read parts of it, and add up what these give: `x Wᵀ + b = Σ_p x_p W_pᵀ + b`.

    The parts are gathered once for all readers, from where the tensor itself was gathered if it was. Annotations are copied to every
    part; parts without channels are left out.

    Args:
        gm: the graph.
        source: the tensor.
        found: linears that read it, their weights in floating point.
        parts: which channels, each int64 `[size]`; together all, each once.

    Returns:
        For each part, its linears, in the order of `found`.
    """
    kept = [part for part in parts if len(part)]
    first = found[0]
    axis, gathered = edit.value(source).ndim - 1, []
    base, own = (source.args[0], edit.attribute(gm, source.args[2])) if _is_part(source) else (source, None)  # type: ignore[arg-type]
    for index, part in enumerate(kept):
        places = part if own is None else own[part]
        channels = edit.add_attribute(gm, f"{first.path.partition('#')[0]}.channels_{index}", places.int(), before=first.node)
        gathered.append(edit.emit(gm, aten.index_select.default, (base, axis, channels), before=first.node))
    made = [[_part(gm, layer, x, part, index) for layer in found] for index, (x, part) in enumerate(zip(gathered, kept, strict=True))]
    for place, layer in enumerate(found):
        total = made[0][place]
        for others in made[1:]:
            total = edit.emit(gm, aten.add.Tensor, (total, others[place]), before=layer.node)
        weight = layer.weight
        edit.replace(layer.node, total)
        edit.drop(gm, weight)
    return made


def _part(gm: GraphModule, layer: Layer, x: Node, part: Tensor, index: int) -> Node:
    """One part of a linear; the first has the bias."""
    name = str(layer.weight.target)
    stored = edit.attribute(gm, layer.weight).detach()[:, part].contiguous()
    weight = edit.add_attribute(gm, f"{name.rpartition('.')[0]}.part_{index}.{name.rpartition('.')[2]}", stored, before=layer.node)
    bias = layer.node.args[2:3] if index == 0 else ()
    node = edit.emit(gm, aten.linear.default, (x, weight, *bias), before=layer.node)
    node.meta["custom"] = {KEY: dict((layer.node.meta.get("custom") or {}).get(KEY, {}))}
    return node


def best_channels(scores: Sequence[Tensor], rows: Sequence[int], share: float, multiple: int = 1) -> list[Tensor]:
    """The channels with the greatest score for the room that they take, over several tensors, in runs of `multiple`.

    Args:
        scores: for each tensor, `[channels]`.
        rows: of all weights that read each tensor: what one channel takes.
        share: of the weights, that the chosen channels may take together.
        multiple: channels are chosen that many at a time.

    Returns:
        For each tensor, its chosen channels in falling order of their score; together at most `share`.
    """
    orders = [score.argsort(descending=True, stable=True) for score in scores]
    room = share * sum(len(score) * count for score, count in zip(scores, rows, strict=True)) + 1e-6
    runs = [
        (float(score[order[start : start + multiple]].sum()) / (multiple * count), -tensor, -start)
        for tensor, (score, order, count) in enumerate(zip(scores, orders, rows, strict=True))
        for start in range(0, len(score) - multiple + 1, multiple)
    ]
    taken = [0] * len(scores)
    for _, minus_tensor, minus_start in sorted(runs, reverse=True):
        tensor, size = -minus_tensor, multiple * rows[-minus_tensor]
        if size <= room and taken[tensor] == -minus_start:
            taken[tensor] += multiple
            room -= size
    return [order[:count] for order, count in zip(orders, taken, strict=True)]


def split_best(
    gm: GraphModule,
    whole: Mapping[Node, Sequence[Layer]],
    scores: Mapping[Node, Tensor],
    share: float,
    multiple: int,
    high: str,
    order: Mapping[Node, Tensor],
) -> tuple[float, int]:
    """Split off the best channels of all tensors, as of `best_channels`, each as of `split_off`.

    Returns:
        The share of the weights that was chosen, and the number of linears that became two.
    """
    rows = [rows_of(found) for found in whole.values()]
    picked = best_channels([scores[source] for source in whole], rows, share, multiple)
    size = sum(len(scores[source]) * count for source, count in zip(whole, rows, strict=True))
    changed = 0
    for (source, found), channels in zip(whole.items(), picked, strict=True):
        if len(channels):
            split_off(gm, source, found, channels, high, order.get(source))
            changed += len(found)
    return sum(len(channels) * count for channels, count in zip(picked, rows, strict=True)) / size, changed


def split_off(gm: GraphModule, source: Node, found: Sequence[Layer], channels: Tensor, high: str = "", size: Tensor | None = None) -> None:
    """Split linears that read one tensor into some channels, in a scheme of their own, and the rest, as annotated.

    Args:
        gm, source, found: as of `split`.
        channels: the chosen ones, int64.
        high: their scheme; "" for that of the rest.
        size: of every channel, `[channels]`: each part is sorted by it, the greatest first; None keeps the order.
    """
    total = edit.value(source).shape[-1]
    rest = torch.ones(total, dtype=torch.bool)
    rest[channels] = False
    order = torch.arange(total) if size is None else size.argsort(descending=True, stable=True)
    made = split(gm, source, found, [order[~rest[order]], order[rest[order]]])
    for node in made[0] if high else ():
        layer = Layer(node, "")
        layer.annotate(change_bits(layer, high))
