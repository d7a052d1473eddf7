import pytest
import torch

from ir import evaluate
from ir.errors import DataError, OptionError
from ir.sites import quantized
from passes.learn_rounding import LearnRounding
from passes.measure import divergence
from tests.families import load
from tests.passes.samples import CALIBRATION, run, tokens

W2 = "canonicalize, untie, annotate(scheme='W2A16', group=32, symmetric=False)"


def logits(gm):
    def call(input_ids):
        given = gm.meta["signature"].bind(input_ids=input_ids)
        return type("Output", (), {"logits": evaluate.run(gm, given)[0]})

    return call


def loss(family, pipeline, batches, **options):
    gm, exact = load(family, **options).graph(), load(family, **options).captured
    run(gm, pipeline, batches)
    return sum(divergence(logits(gm), logits(exact), batch["input_ids"]) for batch in batches)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_learned_codes_beat_the_nearest(family):
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(4)]
    nearest = loss(family, f"{W2}, round_weights(method='nearest')", batches)
    assert loss(family, f"{W2}, learn_rounding(steps=30, rate=0.03)", batches) < 0.8 * nearest


@pytest.mark.parametrize("method", ["nearest", "gptq", "yaqa"])
def test_learning_starts_from_the_codes_of_a_method(method):
    first, second = (load("llama").graph() for _ in range(2))
    run(first, f"{W2}, round_weights(method='{method}')", CALIBRATION)
    run(second, f"{W2}, learn_rounding(start='{method}', steps=1, rate=1e-6, scale_rate=0.0)", CALIBRATION)
    here, there = (next(iter(quantized(gm)))[2] for gm in (first, second))  # later ones see a rounded prefix in one of them
    assert torch.equal(here, there)


def test_one_bit_learns_signs():
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(4)]
    marked = "canonicalize, untie, annotate(scheme='W1A16', group=32)"
    nearest = loss("llama", f"{marked}, round_weights(method='nearest')", batches)
    assert loss("llama", f"{marked}, learn_rounding(steps=30, rate=0.03)", batches) < 0.9 * nearest


def test_annotated_inputs_are_rounded_while_learning():
    gm = load("llama").graph()
    records, _ = run(gm, "canonicalize, untie, annotate(scheme='W4A4'), learn_rounding(steps=3), quantize", CALIBRATION)
    assert records[-2].sites == 14


def test_half_precision_and_embeddings():
    gm = load("llama", torch.bfloat16).graph()
    records, _ = run(gm, "canonicalize, untie, annotate(scheme='W4A16', group=32, embeddings=True), learn_rounding(steps=2)", CALIBRATION)
    assert records[-1].sites == 14 + 1


def test_labels_bring_the_loss_on_the_text_down():
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(4)]

    def text_loss(labels):
        gm = load("llama").graph()
        run(gm, f"{W2}, learn_rounding(steps=30, rate=0.03, labels={labels})", batches)
        found = [logits(gm)(batch["input_ids"]).logits[:, :-1].flatten(0, 1) for batch in batches]
        return sum(torch.nn.functional.cross_entropy(a, b["input_ids"][:, 1:].flatten()) for a, b in zip(found, batches, strict=True))

    assert text_loss(0.5) < text_loss(0.0) - 0.01


def test_labels_need_next_tokens():
    with pytest.raises(OptionError, match="next tokens"):
        run(load("bert").graph(), f"{W2}, learn_rounding(labels=0.1)", CALIBRATION)


def test_the_same_seed_learns_the_same():
    first, second = (load("llama").graph() for _ in range(2))
    for gm in (first, second):
        run(gm, f"{W2}, learn_rounding(steps=3, seed=4)", CALIBRATION)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{W2}, learn_rounding")
    with pytest.raises(OptionError):
        LearnRounding(steps=0)
    with pytest.raises(OptionError, match="share"):
        LearnRounding(labels=1.5)
    with pytest.raises(OptionError, match="no rounding"):
        LearnRounding(start="best")
