import pytest
import torch

from ir import edit, numerics
from ir.encoding import Encoding
from ir.errors import DataError
from ir.rounding import Nearest
from ir.sites import layers
from passes.costs import layer_costs, load, model_costs, save
from passes.observation import watch
from tests import families
from tests.passes.samples import CALIBRATION, context, run

MARKS = [Encoding.parse(f"u{bits}[1,32]") for bits in (2, 3, 4, 8)]


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
    error = X @ (W - numerics.fake_quantize(W, MARKS[0], numerics.choose_qparams(W, MARKS[0], torch.float16))).T
    assert found[layer.path, str(MARKS[0])] == pytest.approx(float(error.square().sum() / (X @ W.T).square().sum()), rel=1e-3)


def test_a_table_is_read_back(tmp_path):
    costs = {("a.b", "u2[1,-1]"): 0.1 + 0.2, ("c", "i1[1,64]"): 1e-30}
    made = {"loss": "model", "seed": 0}
    save(costs, made, tmp_path / "costs.json")
    assert load(tmp_path / "costs.json", made) == costs
    assert [file.name for file in tmp_path.iterdir()] == ["costs.json"]
    with pytest.raises(DataError, match="were made with"):
        load(tmp_path / "costs.json", {"loss": "layer", "seed": 0})
    (tmp_path / "costs.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match="no table of costs"):
        load(tmp_path / "costs.json", made)
