"""Gather what a rounding method needs to know about linears, and no more."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.numerics import QParams
from ir.rounding import Evidence, Rounding, propagate_error
from ir.sites import Layer
from passes.base import Context
from passes.data.fisher import Factors, token_weights
from passes.data.prefix import Inputs, Prefix, Source
from passes.data.spread import Coded, Known, codes_of
from passes.memo.packed import coded

PROPAGATION_DAMPING = 0.1  # of the regression on the prefix's error: a smaller one follows the calibration data too closely


class Group(NamedTuple):
    """Linears that are rounded together, and how to find what is known about each."""

    layers: Sequence[Layer]
    known: Callable[[], list[Known]]


def rounded(
    gm: GraphModule, ctx: Context, linears: dict[Node, Layer], rounding: Rounding, propagation: float
) -> Iterator[tuple[Layer, Tensor, QParams]]:
    """Linears with their codes and parameters, in the order that they run, each to be stored before the next one is asked for.

    What an earlier run has rounded is not rounded again, and no inputs are gathered for it. Args: as of `gather`.
    """
    for group in gather(gm, ctx, linears, rounding, propagation):
        form = coded([(tuple(edit.value(layer.weight).shape), layer.mark.weight) for layer in group.layers])
        made = partial(_round, ctx, group, rounding)
        found = ctx.memo.kept(f"codes of {group.layers[0].path}", made, form)
        yield from ((layer, codes, qparams) for layer, (codes, qparams) in zip(group.layers, found, strict=True))


def _round(ctx: Context, group: Group, rounding: Rounding) -> list[Coded]:
    return codes_of(ctx.ranks, rounding, group.known())


def gather(gm: GraphModule, ctx: Context, linears: dict[Node, Layer], rounding: Rounding, propagation: float) -> Iterator[Group]:
    """Linears in the order that they run, each group to be rounded before the next one is asked for.

    Gradients are those of the model as it is given; inputs come from the prefix as rounded by then.

    Args:
        gm: the graph.
        ctx: with calibration data.
        linears: by node.
        rounding: what it needs is gathered.
        propagation: the share of the prefix's error that the target makes up for: in `cross` if the method needs that, else in the weight.
    """
    factors = Factors(gm, ctx, linears) if "outer" in rounding.needs else None
    weights = token_weights(gm, ctx, linears, getattr(rounding, "groups", 1)) if "grams" in rounding.needs else {}
    if propagation == 0 and {"outer", "inner"}.issuperset(rounding.needs):
        every, world = list(linears.values()), ctx.ranks.world
        for layers in ctx.track([every[start : start + world] for start in range(0, len(every), world)], "round weights"):
            yield Group(layers, partial(_of_gradients, gm, layers, factors))
        return
    for source in Prefix(gm, ctx, linears, exact=propagation > 0, weights=weights).sources("round weights"):
        yield Group(source.layers, partial(_of_prefix, gm, source, rounding, propagation, factors))


def _of_gradients(gm: GraphModule, layers: Sequence[Layer], factors: Factors | None) -> list[Known]:
    found = []
    for layer in layers:
        outer, inner = factors.take(layer.node) if factors else (None, None)
        found.append((layer, Evidence(outer=outer, inner=inner), _weight(gm, layer)))
    return found


def _of_prefix(gm: GraphModule, source: Source, rounding: Rounding, propagation: float, factors: Factors | None) -> list[Known]:
    asymmetric, inputs = "cross" in rounding.needs, source.inputs()
    cross = _cross(inputs, propagation) if asymmetric else None
    found = []
    for layer in inputs.layers:
        outer, inner = factors.take(layer.node) if factors else (None, None)
        known = Evidence(inputs.gram, cross, inputs.grams.get(layer.node), outer, inner)
        W = _weight(gm, layer)
        if inputs.cross is not None and not asymmetric:
            W = propagate_error(W, inputs.gram, inputs.cross, propagation, PROPAGATION_DAMPING)
        found.append((layer, known, W))
    return found


def _cross(inputs: Inputs, propagation: float) -> Tensor:
    """The cross moment with a share of the prefix's error, `(X̂ + α (X − X̂))ᵀX̂`."""
    return inputs.gram if inputs.cross is None else inputs.gram + propagation * (inputs.cross - inputs.gram)


def _weight(gm: GraphModule, layer: Layer) -> Tensor:
    return edit.attribute(gm, layer.weight).detach().float()
