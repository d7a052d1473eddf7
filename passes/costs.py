"""What each pair of encodings, of weight and input, costs the model at each linear, predicted from one run over the calibration data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError
from ir.files import appearing
from ir.rounding import Evidence, Rounding
from ir.sites import Layer, Mark
from passes.base import Context
from passes.gradients import output_sensitivity
from passes.observation import sampled
from passes.prefix import still_inputs

FORMAT = "fxpress-costs-2"
TOKENS = 32768  # of the calibration data, that inputs are taken from
Costs = dict[tuple[str, str], float]  # by the path of a layer and the text of a mark


def model_costs(
    gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Mark]], rounding: Rounding, tokens: int, seed: int
) -> Costs:
    """`½ Σ_n h_n ((ΔW G ΔWᵀ)_nn + (Ŵ D Ŵᵀ)_nn)`, nats a token: `G = E[xxᵀ]` of the inputs, `D = E[Δx Δxᵀ]` of what their rounding leaves.

    `h` is that of `output_sensitivity`, `Ŵ` the rounded weight. Of `‖ΔW x + Ŵ Δx‖²` the mixed term is left out, since `Δx` hardly
    follows `x`. Inputs that are in floating point, or rounded already, add nothing.

    Args:
        gm: the graph, not yet rounded; it is not changed.
        ctx: with calibration data.
        options: the marks to look at.
        rounding: that leaves `ΔW`.
        tokens: that gradients are taken from.
        seed: of what is drawn for them.
    """
    feels = output_sensitivity(gm, ctx, [layer.node for layer in options], tokens, seed)
    return _costs(gm, ctx, options, rounding, {layer.node: 0.5 * feels[layer.node] for layer in options})


def layer_costs(gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Mark]], rounding: Rounding) -> Costs:
    """`(tr(ΔW G ΔWᵀ) + tr(Ŵ D Ŵᵀ)) / tr(W G Wᵀ)`: the relative squared error of each layer's own output; letters as of `model_costs`."""
    return _costs(gm, ctx, options, rounding, None)


def _costs(
    gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Mark]], rounding: Rounding, feels: Mapping[object, Tensor] | None
) -> Costs:
    found: Costs = {}
    linears = {layer.node: layer for layer in options}
    for inputs in still_inputs(gm, sampled(ctx, TOKENS), linears, "predict", _roundings(options)):
        for layer in inputs.layers:
            W = edit.attribute(gm, layer.weight).detach().float()
            weighed = feels[layer.node] if feels is not None else torch.ones(len(W)) / _squares(W, inputs.gram).sum().clamp_min(1e-30)
            for encoding in dict.fromkeys(mark.weight for mark in options[layer]):
                codes, qparams = rounding.round_weight(W, encoding, Evidence(gram=inputs.gram))
                rounded = numerics.dequantize(codes, qparams, encoding)
                of_weight = _squares(W - rounded, inputs.gram)
                of_input = {given: _squares(rounded, D) for given, D in inputs.noise.items()}
                for mark in options[layer]:
                    if mark.weight == encoding:
                        errors = of_weight + of_input[mark.input] if mark.input in of_input else of_weight
                        found[layer.path, str(mark)] = float(weighed @ errors)
    return found


def _roundings(options: Mapping[Layer, Sequence[Mark]]) -> dict[Node, list[Encoding]]:
    """The encodings that each tensor may get which is not rounded already."""
    found: dict[Node, dict[Encoding, None]] = {}
    for layer, marks in options.items():
        if not layer.input_rounded:
            given = dict.fromkeys(mark.input for mark in marks if mark.input is not None)
            found.setdefault(layer.site("input").operand, {}).update(given)
    return {source: list(encodings) for source, encodings in found.items()}


def _squares(W: Tensor, gram: Tensor) -> Tensor:
    """`(W G Wᵀ)_nn [N]`, the mean square of each output."""
    return ((W @ gram) * W).sum(1).clamp_min(0)


def save(costs: Costs, made: Mapping[str, Any], path: Path) -> None:
    """Write a table of costs, and how it was made, under a temporary name first."""
    rows = [[layer, mark, cost] for (layer, mark), cost in costs.items()]
    with appearing(path) as draft:
        draft.write_text(json.dumps({"format": FORMAT, "made": dict(made), "costs": rows}, indent=0), encoding="utf-8")


def load(path: Path, made: Mapping[str, Any]) -> Costs:
    """Read a table of costs.

    Raises:
        DataError: the file is none, is of another version of the format, or was made in another way.
    """
    remedy = "remove the file to predict anew"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {(str(layer), str(mark)): float(cost) for layer, mark, cost in data["costs"]}
        known = data["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("this is no table of costs", where=str(path), remedy=remedy) from error
    if not known:
        raise DataError(f"these costs are in the format {data['format']!r}, not {FORMAT!r}", where=str(path), remedy=remedy)
    if data.get("made") != dict(made):
        raise DataError(f"these costs were made with {data.get('made')}, not {dict(made)}", where=str(path), remedy=remedy)
    return found
