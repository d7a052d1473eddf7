"""What each form of a linear, its encodings and its size, costs the model, predicted from one run over the calibration data."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.encoding import Encoding
from ir.errors import DataError
from ir.files import appearing, read_json
from ir.rounding import Rounding
from ir.sites import Layer
from passes.base import Context
from passes.budget.forms import WHOLE, Cuts, Form
from passes.data.gradients import output_sensitivity
from passes.data.observation import sampled
from passes.data.prefix import Inputs, Source
from passes.data.still import still_sources
from passes.memo.packed import TABLE
from passes.pruning.fit import Fit, squares

FORMAT = "fxpress-costs-2"
TOKENS = 32768  # of the calibration data, that inputs are taken from
Costs = dict[tuple[str, str], float]  # by the path of a layer and the text of a form
Wanted = Mapping[Layer, Sequence[Form]]


def model_costs(gm: GraphModule, ctx: Context, options: Wanted, rounding: Rounding, tokens: int, seed: int, cuts: Cuts = WHOLE) -> Costs:
    """`½ Σ_n h_n ((ΔW G ΔWᵀ)_nn + (Ŵ D Ŵᵀ)_nn)`, nats a token: `G = E[xxᵀ]` of the inputs, `D = E[Δx Δxᵀ]` of what their rounding leaves.

    `h` is that of `output_sensitivity`, `Ŵ` the rounded weight, of a linear that loses columns refitted before; of one that loses rows
    the sum is over those that stay. Of `‖ΔW x + Ŵ Δx‖²` the mixed term is left out, since `Δx` hardly follows `x`. Inputs that are in
    floating point, or rounded already, add nothing.

    Args:
        gm: the graph, not yet rounded; it is not changed.
        ctx: with calibration data.
        options: the forms to look at.
        rounding: that leaves `ΔW`.
        tokens: that gradients are taken from.
        seed: of what is drawn for them.
        cuts: which rows and columns smaller forms keep.
    """
    feels = output_sensitivity(gm, ctx, [layer.node for layer in options], tokens, seed)
    return _costs(gm, ctx, options, rounding, cuts, {layer.node: 0.5 * feels[layer.node] for layer in options})


def layer_costs(gm: GraphModule, ctx: Context, options: Wanted, rounding: Rounding, cuts: Cuts = WHOLE) -> Costs:
    """`(tr(ΔW G ΔWᵀ) + tr(Ŵ D Ŵᵀ)) / tr(W G Wᵀ)`: the relative squared error of each layer's own output; letters as of `model_costs`."""
    return _costs(gm, ctx, options, rounding, cuts, None)


def _costs(gm: GraphModule, ctx: Context, options: Wanted, rounding: Rounding, cuts: Cuts, feels: Mapping[object, Tensor] | None) -> Costs:
    found: Costs = {}
    linears = {layer.node: layer for layer in options}
    for source in still_sources(gm, sampled(ctx, TOKENS), linears, "predict", _roundings(options)):
        make = partial(_of_source, gm, ctx, source, options, rounding, cuts, feels)
        of_source: Costs = ctx.memo.kept(f"costs of {source.layers[0].path}", make, TABLE)
        found |= of_source
    return found


def _of_source(
    gm: GraphModule, ctx: Context, source: Source, options: Wanted, rounding: Rounding, cuts: Cuts, feels: Mapping[object, Tensor] | None
) -> Costs:
    """Those of all linears that read one tensor; each process rounds some of these."""
    inputs, found = source.inputs(), []
    owner = ctx.ranks.dealt({layer: len(options[layer]) * edit.value(layer.weight).numel() for layer in source.layers})
    for layer in source.layers:
        if owner[layer] != ctx.ranks.rank:
            continue
        W = edit.attribute(gm, layer.weight).detach().float()
        weighed = feels[layer.node] if feels is not None else torch.ones(len(W)) / squares(W, inputs.gram).sum().clamp_min(1e-30)
        found += [(layer.path, *row) for row in _of_layer(gm, layer, inputs, options[layer], rounding, cuts, weighed)]
    every = [row for own in ctx.ranks.everyone(found) for row in own]
    order = {layer.path: place for place, layer in enumerate(source.layers)}
    return {(path, text): cost for path, text, cost in sorted(every, key=lambda row: order[row[0]])}


def _of_layer(
    gm: GraphModule, layer: Layer, inputs: Inputs, forms: Sequence[Form], rounding: Rounding, cuts: Cuts, weighed: Tensor
) -> Iterator[tuple[str, float]]:
    """The costs of a linear's forms, by their texts; those that keep the same columns in the same codes are rounded once."""
    ways: dict[tuple[int, Encoding], list[Form]] = {}
    for form in forms:
        ways.setdefault((form.shape_of(layer)[1], form.weight), []).append(form)
    fits: dict[int, Fit] = {}
    for (size, encoding), own in ways.items():
        if size not in fits:
            fits[size] = Fit.of(gm, layer, inputs, cuts.columns(layer, own[0]), cuts.damping)
            if fits[size].kept is not None:
                yield _columns(size), float((weighed * fits[size].errors()).sum())
        rounded = fits[size].rounded(rounding, encoding)
        of_weight = fits[size].errors(rounded)
        for form in own:
            noise = inputs.noise.get(form.input) if form.input is not None else None
            errors = weighed * (of_weight if noise is None else of_weight + squares(rounded, noise))
            rows = cuts.rows(layer, form)
            yield str(form), float(errors.sum() if rows is None else errors[rows].sum())


def _columns(size: int) -> str:
    """What dropping columns alone costs stands under this text."""
    return f"{size} columns"


def raised(costs: Costs, rate: float) -> Costs:
    """The costs with that of dropping columns multiplied by a rate; what rounding adds to it stays."""
    if rate == 1:
        return costs
    found = {}
    for (path, form), cost in costs.items():
        _, _, shape = form.partition(" ")
        dropping = costs.get((path, _columns(int(shape.partition("x")[2])))) if "x" in shape else None
        found[path, form] = cost if dropping is None else cost + (rate - 1) * dropping
    return found


def _roundings(options: Wanted) -> dict[Node, list[Encoding]]:
    """The encodings that each tensor may get which is not rounded already."""
    found: dict[Node, dict[Encoding, None]] = {}
    for layer, forms in options.items():
        if not layer.input_rounded:
            given = dict.fromkeys(form.input for form in forms if form.input is not None)
            found.setdefault(layer.site("input").operand, {}).update(given)
    return {source: list(encodings) for source, encodings in found.items()}


def save(costs: Costs, made: Mapping[str, Any], path: Path) -> None:
    """Write a table of costs, and how it was made, under a temporary name first."""
    rows = [[layer, form, cost] for (layer, form), cost in costs.items()]
    with appearing(path) as draft:
        draft.write_text(json.dumps({"format": FORMAT, "made": dict(made), "costs": rows}, indent=0), encoding="utf-8")


def load(path: Path, made: Mapping[str, Any]) -> Costs:
    """Read a table of costs.

    Raises:
        DataError: the file is none, is of another version of the format, or was made in another way.
    """
    remedy = "remove the file to predict anew"
    try:
        data = read_json(path)
        found = {(str(layer), str(form)): float(cost) for layer, form, cost in data["costs"]}
        known = data["format"] == FORMAT
    except DataError as error:
        raise DataError(f"this is no table of costs: {error.what}", where=str(path), remedy=remedy) from error
    except (ArithmeticError, ValueError, KeyError, TypeError) as error:
        raise DataError("this is no table of costs", where=str(path), remedy=remedy) from error
    if not all(map(math.isfinite, found.values())):
        raise DataError("this table has costs that are not finite", where=str(path), remedy=remedy)
    if not known:
        raise DataError(f"these costs are in the format {data['format']!r}, not {FORMAT!r}", where=str(path), remedy=remedy)
    if data.get("made") != dict(made):
        raise DataError(f"these costs were made with {data.get('made')}, not {dict(made)}", where=str(path), remedy=remedy)
    return found
