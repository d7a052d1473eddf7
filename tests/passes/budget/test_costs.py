import pytest
import torch

from ir import edit, numerics
from ir.errors import DataError
from ir.rounding import Nearest
from ir.sites import layers
from passes.budget.costs import layer_costs, load, model_costs, save
from passes.budget.forms import Form
from passes.data.observation import watch
from tests import families
from tests.passes.samples import CALIBRATION, context, run

MARKS = [Form.parse(f"u{bits}[1,32]") for bits in (2, 3, 4, 8)]


def prepared():
    gm = families.load("llama").graph()
    run(gm, "canonicalize, untie")
    return gm, context(gm, CALIBRATION), {layer: MARKS for layer in layers(gm) if layer.path.endswith("_proj")}


def test_wider_codes_cost_less():
    gm, ctx, options = prepared()
    costs = model_costs(gm, ctx, options, Nearest(), tokens=128, seed=0)
    assert len(costs) == 14 * 4
    for layer in options:
        falling = [costs[layer.path, str(mark)] for mark in MARKS]
        assert falling == sorted(falling, reverse=True) and falling[-1] > 0


def test_a_layers_own_cost_is_the_relative_error_of_its_output():
    gm, ctx, options = prepared()
    (layer,) = [layer for layer in options if layer.path.endswith("layers.0.self_attn.q_proj")]
    found = layer_costs(gm, ctx, {layer: MARKS[:1]}, Nearest())
    seen = []
    watch(gm, ctx, [layer.site("input").operand], lambda _, value: seen.append(value.flatten(0, -2)), "test")
    X, W = torch.cat(seen), edit.attribute(gm, layer.weight).detach()
    encoding = MARKS[0].weight
    error = X @ (W - numerics.fake_quantize(W, encoding, numerics.choose_qparams(W, encoding, torch.float16))).T
    assert found[layer.path, str(MARKS[0])] == pytest.approx(float(error.square().sum() / (X @ W.T).square().sum()), rel=1e-3)


def test_a_table_is_read_back(tmp_path):
    costs = {("a.b", "u2[1,-1]"): 0.1 + 0.2, ("c", "i1[1,64]/i8[1,-1]dynamic"): 1e-30}
    made = {"loss": "model", "seed": 0}
    save(costs, made, tmp_path / "costs.json")
    assert load(tmp_path / "costs.json", made) == costs
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]
    with pytest.raises(DataError, match="were made with"):
        load(tmp_path / "costs.json", {"loss": "layer", "seed": 0})
    (tmp_path / "costs.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match="no table of costs"):
        load(tmp_path / "costs.json", made)
    file = tmp_path / "costs.json"
    save(costs, made, file)
    file.write_text(file.read_text().replace("fxpress-costs-2", "fxpress-costs-1"))
    with pytest.raises(DataError, match="in the format 'fxpress-costs-1'"):
        load(file, made)


INPUTS = ["i4[1,-1]dynamic", "i4[1,-1]dynamic*0.7", "i8[1,-1]dynamic", "i4[1,16]dynamic", "u4[-1]"]


@pytest.mark.parametrize("end", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_rounding_of_inputs_costs_what_it_does_to_the_output(end):
    gm, ctx, options = prepared()
    (layer,) = [layer for layer in options if layer.path.endswith(end)]
    marks = [Form.parse("u8[1,32]"), *(Form.parse(f"u8[1,32]/{text}") for text in INPUTS)]
    found = layer_costs(gm, ctx, {layer: marks}, Nearest())
    seen = []
    watch(gm, ctx, [layer.site("input").operand], lambda _, value: seen.append(value), "test")
    W = edit.attribute(gm, layer.weight).detach()
    exact = torch.cat([x @ W.T for x in seen])
    for mark in marks[1:]:
        error = torch.cat([numerics.fake_quantize(x, mark.input) @ W.T for x in seen]) - exact
        added = found[layer.path, str(mark)] - found[layer.path, "u8[1,32]"]
        assert added == pytest.approx(float(error.square().sum() / exact.square().sum()), rel=0.05)


def test_inputs_that_are_rounded_already_cost_nothing_more():
    gm, ctx, _ = prepared()
    run(gm, "annotate(scheme='W4A4'), quantize(weights=False)")
    (layer,) = [layer for layer in layers(gm) if layer.path.endswith("0.mlp.up_proj")]
    both = [Form(None, layer.mark.weight), Form(*layer.mark)]
    found = layer_costs(gm, ctx, {layer: both}, Nearest())
    assert found[layer.path, str(both[0])] == found[layer.path, str(both[1])] > 0
    assert model_costs(gm, ctx, {layer: both[1:]}, Nearest(), tokens=64, seed=0)[layer.path, str(both[1])] > 0


def test_the_models_loss_weighs_the_outputs_of_both_errors():
    gm, ctx, options = prepared()
    (layer,) = [layer for layer in options if layer.path.endswith("1.mlp.up_proj")]
    marks = [Form.parse(text) for text in ("u4[1,32]", "u4[1,32]/i8[1,-1]dynamic", "u4[1,32]/i4[1,-1]dynamic", "u3[1,32]/i4[1,-1]dynamic")]
    costs = model_costs(gm, ctx, {layer: marks}, Nearest(), tokens=128, seed=0)
    rising = [costs[layer.path, str(mark)] for mark in marks]
    assert 0 < rising[0] < rising[1] < rising[2] < rising[3]
    assert rising[1] - rising[0] < 0.02 * (rising[2] - rising[0])  # four bits less: 256 times the squared error


@pytest.mark.parametrize("cost", ["1e999", "NaN", "1" + "0" * 400, "[]", '"x"', "[" * 10_000])
def test_costs_that_are_none_are_refused(tmp_path, cost):
    file = tmp_path / "costs.json"
    file.write_text(f'{{"format": "fxpress-costs-2", "made": {{}}, "costs": [["a", "i4[1,-1]", {cost}]]}}')
    with pytest.raises(DataError):
        load(file, {})
