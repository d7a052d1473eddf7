import pytest
import torch

import passes
from ir.errors import DataError, OptionError
from ir.sites import layers
from passes.learn_masks import LearnMasks
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, run, vectors, wide_share

MARKED = "canonicalize, untie, annotate(scheme='W4A4')"


def test_the_share_is_met_from_below_and_shared_inputs_share_a_mask():
    gm = load("llama").graph()
    run(gm, f"{MARKED}, learn_masks(steps=5, multiple=4, rows=2)", CALIBRATION)
    inputs = {}
    for layer in layers(gm):
        if layer.kind == "Linear":
            inputs.setdefault(layer.path.partition("#")[0], set()).add(layer.site("input").operand)
    assert 0.1 < wide_share(gm) <= 0.125
    assert inputs["model.layers.0.self_attn.q_proj"] == inputs["model.layers.0.self_attn.v_proj"]


def test_a_budget_in_bits_counts_scales():
    marked = "canonicalize, untie, annotate(scheme='W1A16')"
    learned = "learn_masks(high='W4A16', bits=2.2, steps=2, rows=1, multiple=1)"
    made = passes.compile(load("llama").captured, f"{marked}, {learned}, round_weights", CALIBRATION)
    assert 2.1 < made.effective_bits <= 2.2
    with pytest.raises(OptionError, match="least budget is bits="):
        run(load("llama").graph(), f"{marked}, learn_masks(high='W4A16', bits=1.1)", CALIBRATION)


def test_outliers_are_learned():
    model, x = Mlp().eval(), vectors(rows=64)
    x[:, 5] *= 50
    learned = "learn_masks(steps=150, rate=0.05, rows=64, share=0.05, strength=0.1, multiple=1)"
    made = passes.compile(model, f"{MARKED}, {learned}, quantize", [(x,)], args=(x,))
    channels = next(tensor for name, tensor in made.graph.state_dict().items() if name == "up.channels_0")
    assert 5 in channels.tolist()


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
def test_the_same_seed_learns_the_same(loss):
    first, second = (load("llama").graph() for _ in range(2))
    for gm in (first, second):
        run(gm, f"{MARKED}, learn_masks(steps=2, loss='{loss}', rows=1)", CALIBRATION)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, learn_masks")
    with pytest.raises(OptionError, match="causal"):
        passes.compile(Mlp(), f"{MARKED}, learn_masks(loss='cross_entropy')", [(vectors(),)], args=(vectors(),))
    with pytest.raises(OptionError, match="causal"):
        run(load("bert").graph(), f"{MARKED}, learn_masks(loss='cross_entropy')", CALIBRATION)
    for options in ({"high": "W9A9"}, {"share": 1.0}, {"loss": "none"}, {"steps": 0}):
        with pytest.raises(OptionError):
            LearnMasks(**options)
