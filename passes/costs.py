"""What each encoding of each weight costs the model, predicted from one run over the calibration data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError
from ir.files import appearing
from ir.rounding import Evidence, Rounding
from ir.sites import Layer
from passes.base import Context
from passes.gradients import output_sensitivity
from passes.observation import sampled
from passes.prefix import still_inputs

FORMAT = "fxpress-costs-1"
TOKENS = 32768  # of the calibration data, that inputs are taken from
Costs = dict[tuple[str, str], float]  # by the path of a layer and the text of an encoding


def model_costs(
    gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Encoding]], rounding: Rounding, tokens: int, seed: int
) -> Costs:
    """`½ Σ_n h_n (ΔW G ΔWᵀ)_nn`, nats a token: `G = E[xxᵀ]` of the inputs, `h` of `output_sensitivity`.

    Args:
        gm: the graph, not yet rounded; it is not changed.
        ctx: with calibration data.
        options: the encodings to look at.
        rounding: that leaves `ΔW`.
        tokens: that gradients are taken from.
        seed: of what is drawn for them.
    """
    feels = output_sensitivity(gm, ctx, [layer.node for layer in options], tokens, seed)
    return _costs(gm, ctx, options, rounding, {layer.node: 0.5 * feels[layer.node] for layer in options})


def layer_costs(gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Encoding]], rounding: Rounding) -> Costs:
    """`tr(ΔW G ΔWᵀ) / tr(W G Wᵀ)`: the relative squared error of each layer's own output."""
    return _costs(gm, ctx, options, rounding, None)


def _costs(
    gm: GraphModule, ctx: Context, options: Mapping[Layer, Sequence[Encoding]], rounding: Rounding, feels: Mapping[object, Tensor] | None
) -> Costs:
    found: Costs = {}
    for inputs in still_inputs(gm, sampled(ctx, TOKENS), {layer.node: layer for layer in options}, "predict"):
        for layer in inputs.layers:
            W = edit.attribute(gm, layer.weight).detach().float()
            weighed = feels[layer.node] if feels is not None else torch.ones(len(W)) / _squares(W, inputs.gram).sum().clamp_min(1e-30)
            for encoding in options[layer]:
                codes, qparams = rounding.round_weight(W, encoding, Evidence(gram=inputs.gram))
                errors = _squares(W - numerics.dequantize(codes, qparams, encoding), inputs.gram)
                found[layer.path, str(encoding)] = float(weighed @ errors)
    return found


def _squares(W: Tensor, gram: Tensor) -> Tensor:
    """`(W G Wᵀ)_nn`, the mean square of each output `[N]`."""
    return ((W @ gram) * W).sum(1).clamp_min(0)


def save(costs: Costs, made: Mapping[str, Any], path: Path) -> None:
    """Write a table of costs, and how it was made, under a temporary name first."""
    rows = [[layer, encoding, cost] for (layer, encoding), cost in costs.items()]
    with appearing(path) as draft:
        draft.write_text(json.dumps({"format": FORMAT, "made": dict(made), "costs": rows}, indent=0), encoding="utf-8")


def load(path: Path, made: Mapping[str, Any]) -> Costs:
    """Read a table of costs.

    Raises:
        DataError: the file is none, or was made in another way.
    """
    remedy = "remove the file to predict anew"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {(str(layer), str(encoding)): float(cost) for layer, encoding, cost in data["costs"]}
        known = data["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("this is no table of costs", where=str(path), remedy=remedy) from error
    if not known or data.get("made") != dict(made):
        raise DataError(f"these costs were made with {data.get('made')}, not {dict(made)}", where=str(path), remedy=remedy)
    return found
