import pytest
import torch

import passes
from ir import edit
from ir.capture import capture
from ir.errors import DataError, OptionError
from ir.sites import quantized
from passes.measure import divergence
from passes.tune import Tune
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, compiled, run, tokens, vectors

W2 = "canonicalize, untie, annotate(scheme='W2A16', group=32, symmetric=False), round_weights"
MANY = [{"input_ids": tokens(seed=seed)} for seed in range(8)]


def codes(gm):
    return {str(node.args[0].target): tensor for node, _, tensor, _ in quantized(gm)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", [("scales",), ("gains",)])
def test_each_part_brings_the_model_nearer(family, parts):
    exact = compiled(family, "canonicalize")
    before = passes.compile(load(family).captured, W2, MANY)
    after = passes.compile(load(family).captured, f"{W2}, tune(steps=40, rate=0.005, parts={parts})", MANY)
    ids = torch.cat([batch["input_ids"] for batch in MANY])
    assert divergence(after, exact, ids) < divergence(before, exact, ids)
    assert all(torch.equal(tensor, codes(after.graph)[name]) for name, tensor in codes(before.graph).items())


def test_zero_points_find_their_way_back():
    gm = capture(Mlp(), (vectors(),))
    _, ctx = run(gm, W2, [(vectors(seed),) for seed in range(16)])
    node = next(node for node in gm.graph.find_nodes(op="get_attr") if str(node.target) == "down.weight_zero_point")
    edit.set_attribute(gm, node, (edit.attribute(gm, node) + 1).clamp_max(3))
    records, _ = run(gm, "tune(steps=100, rate=0.003, parts=('zero_points',))", ctx=ctx)
    assert records[-1].difference > 0  # something better than the start was found


def test_norms_without_gains_get_them():
    made = passes.compile(
        load("llama").captured, f"canonicalize, untie, fold_norm, {W2}, tune(steps=40, rate=0.005, parts=('gains',))", MANY
    )
    assert any(name.endswith("norm.gain") for name in made.graph.state_dict())


def test_rounded_activations_pass_gradients():
    exact = compiled("gpt2", "canonicalize")
    marked = "canonicalize, untie, annotate(scheme='W4A4'), quantize"
    before, after = (passes.compile(load("gpt2").captured, marked + more, MANY) for more in ("", ", tune(steps=40, rate=0.005)"))
    ids = torch.cat([batch["input_ids"] for batch in MANY])
    assert divergence(after, exact, ids) < divergence(before, exact, ids)


def test_half_precision():
    made = passes.compile(load("llama", torch.bfloat16).captured, f"{W2}, tune(steps=2)", MANY)
    assert made(input_ids=tokens()).logits.isfinite().all()


def test_the_same_seed_trains_the_same():
    first, second = (passes.compile(load("llama").captured, f"{W2}, tune(steps=5, seed=3)", MANY).graph.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), "canonicalize, annotate, quantize, tune")
    with pytest.raises(DataError, match="two batches"):
        run(load("llama").graph(), "canonicalize, annotate, round_weights(method='nearest'), tune", CALIBRATION[:1])
    with pytest.raises(OptionError, match="round_weights"):
        run(load("llama").graph(), "canonicalize, annotate, tune", CALIBRATION)
    with pytest.raises(OptionError, match="quantize_cache"):
        run(load("llama").graph(), f"{W2}, quantize_cache, tune", CALIBRATION)
    for options in ({"steps": 0}, {"parts": ("signs",)}, {"rate": 0.0}):
        with pytest.raises(OptionError):
            Tune(**options)
