"""Gather what a rounding method needs to know about linears, and no more."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.rounding import Evidence, Rounding, propagate_error
from ir.sites import Layer
from passes.base import Context
from passes.fisher import Factors, token_weights
from passes.prefix import Inputs, Prefix

PROPAGATION_DAMPING = 0.1  # of the regression on the prefix's error: a smaller one follows the calibration data too closely
Known = tuple[Layer, Evidence, Tensor]  # a linear, what is known about it, and the weight to round


def gather(gm: GraphModule, ctx: Context, linears: dict[Node, Layer], rounding: Rounding, propagation: float) -> Iterator[Known]:
    """Linears in the order that they run, each to be rounded before the next one is asked for.

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
        return _of_gradients(gm, ctx, linears, factors)
    return _of_prefix(gm, ctx, linears, rounding, propagation, factors, weights)


def _of_gradients(gm: GraphModule, ctx: Context, linears: dict[Node, Layer], factors: Factors | None) -> Iterator[Known]:
    for node, layer in ctx.track(linears.items(), "round weights"):
        outer, inner = factors.take(node) if factors else (None, None)
        yield layer, Evidence(outer=outer, inner=inner), _weight(gm, layer)


def _of_prefix(
    gm: GraphModule,
    ctx: Context,
    linears: dict[Node, Layer],
    rounding: Rounding,
    propagation: float,
    factors: Factors | None,
    weights: Mapping[Node, list[Tensor]],
) -> Iterator[Known]:
    asymmetric = "cross" in rounding.needs
    for inputs in Prefix(gm, ctx, linears, exact=propagation > 0, weights=weights).inputs("round weights"):
        cross = _cross(inputs, propagation) if asymmetric else None
        for layer in inputs.layers:
            outer, inner = factors.take(layer.node) if factors else (None, None)
            known = Evidence(inputs.gram, cross, inputs.grams.get(layer.node), outer, inner)
            W = _weight(gm, layer)
            if inputs.cross is not None and not asymmetric:
                W = propagate_error(W, inputs.gram, inputs.cross, propagation, PROPAGATION_DAMPING)
            yield layer, known, W


def _cross(inputs: Inputs, propagation: float) -> Tensor:
    """The cross moment with a share of the prefix's error, `(X̂ + α (X − X̂))ᵀX̂`."""
    return inputs.gram if inputs.cross is None else inputs.gram + propagation * (inputs.cross - inputs.gram)


def _weight(gm: GraphModule, layer: Layer) -> Tensor:
    return edit.attribute(gm, layer.weight).detach().float()
