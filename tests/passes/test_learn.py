import pytest
import torch

from ir import evaluate
from ir.errors import DataError, OptionError
from ir.sites import layers
from passes.learn import Learn
from tests.families import load
from tests.passes.maps import OPENED, kept
from tests.passes.samples import CALIBRATION, run, tokens

MARKED = f"{OPENED}, rotate_channels(where=['R1', 'R2']), annotate(scheme='W4A4')"


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", "steps=4, loss='block'"), ("gpt2", "steps=6"), ("gemma2", "steps=3, parts=['clips'], rotated=False")],
)
def test_what_is_learned_keeps_the_function(family, options):
    _, records, _, error = kept(family, f"{MARKED}, learn({options})")
    assert records[-1].sites > 0
    assert error < 1e-4


def test_rotations_are_learned_where_norms_have_no_gain():
    _, records, _, error = kept("llama", f"{OPENED}, annotate(scheme='W4A4'), learn(parts=['rotations'], steps=6)")
    assert records[-1].sites == 3
    assert error < 1e-4


def divergence(exact, gm, batch):
    p, q = (evaluate.run(model, batch)[0].log_softmax(-1) for model in (exact, gm))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("loss", ["model", "block"])
def test_learning_lowers_the_error_of_what_comes_after(loss):
    found, exact = {}, load("llama").captured
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(8)]
    for text in ("", f", learn(steps=40, rate=0.01, loss='{loss}', clip=1.0)"):
        gm = load("llama").graph()
        _, ctx = run(gm, f"{MARKED}{text}, rotate_channels(where=['R4'])", batches)
        run(gm, "quantize(weights=False), round_weights", ctx=ctx)  # which searches for the weights' clips anew
        found[bool(text)] = sum(divergence(exact, gm, batch) for batch in ctx.calibration)
    assert found[True] < found[False]


def test_half_precision_models_are_learned_in_their_dtype():
    gm = load("llama", torch.bfloat16).graph()
    records, _ = run(gm, f"{MARKED}, learn(steps=3), rotate_channels(where=['R4'])", CALIBRATION)
    assert records[-2].sites > 0
    assert all(value.dtype == torch.bfloat16 for name, value in gm.state_dict().items() if "proj" in name)


def test_clips_are_annotated():
    gm, *_ = kept("llama", f"{MARKED}, learn(parts=['clips'], steps=6, clip=0.8)")
    clips = [layer.site("input").encoding.clip for layer in layers(gm) if layer.site("input").encoding]
    assert len(clips) == 14
    assert all(0.5 < clip < 1 for clip in clips)


def test_the_same_seed_learns_the_same():
    first, second = (kept("llama", f"{MARKED}, learn(steps=4, seed=2)")[0] for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_it_refuses_one_batch_and_no_annotations():
    with pytest.raises(DataError, match="two batches"):
        run(load("llama").graph(), MARKED + ", learn", CALIBRATION[:1])
    with pytest.raises(OptionError, match="annotated"):
        run(load("llama").graph(), f"{OPENED}, learn", CALIBRATION)


def test_clips_that_are_not_learned_stay():
    gm, *_ = kept("llama", f"{MARKED}, clip_activations, learn(parts=['scales'], steps=2)")
    clips = {layer.site("input").encoding.clip for layer in layers(gm) if layer.site("input").encoding}
    before, *_ = kept("llama", f"{MARKED}, clip_activations")
    assert clips == {layer.site("input").encoding.clip for layer in layers(before) if layer.site("input").encoding}


def test_static_scales_have_no_clips_to_learn():
    gm, records, _, _ = kept("llama", f"{OPENED}, annotate(scheme='W8A8', dynamic=False), learn(parts=['clips'], steps=2)")
    assert records[-1].sites == 0
    assert all("*" not in str(layer.site("input").encoding) for layer in layers(gm) if layer.kind == "Linear")


def test_what_is_frozen_is_noted():
    _, _, ctx, _ = kept("llama", "canonicalize, untie, annotate(scheme='W4A4'), learn(parts=['rotations', 'clips'], steps=2)")
    assert any("learn: left out the channels" in note and "rotate" in note for note in ctx.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"parts": ("widths",)},
        {"loss": "mse"},
        {"steps": 0},
        {"rate": 0.0},
        {"clip": 1.5},
        {"loss": "block", "parts": ("rotations",)},
        {"rows": 0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        Learn(**options)
