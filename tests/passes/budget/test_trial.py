import pytest
import torch

import passes
from ir import edit, store
from ir.rounding import GPTQ, Nearest
from ir.sites import layers
from ir.store import Store
from passes.budget.forms import Form
from passes.budget.trial import Trial, hold_out
from passes.learning.divergence import divergence
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, context, run, same_weights, vectors

MARK = Form.parse("u2[1,32]")


def prepared(family="llama"):
    gm = load(family).graph()
    run(gm, "canonicalize, untie")
    ctx = context(gm, CALIBRATION)
    return gm, ctx, [layer for layer in layers(gm) if layer.kind == "Linear"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama_tied"])
def test_it_measures_what_the_rounded_model_does(family):
    gm, ctx, linears = prepared(family)
    before = edit.copied(gm)
    known, held = hold_out(ctx, 60, seed=0)
    variants = [dict.fromkeys(linears, MARK), dict.fromkeys(linears[3:], MARK), dict.fromkeys(linears[:-1], MARK), {}]
    found = Trial(gm, known, held, Nearest()).divergences(variants)
    assert same_weights(gm, before)
    for marks, measured in zip(variants, found, strict=True):
        copy = edit.copied(gm)
        for layer in layers(copy):
            layer.site("weight").annotate(MARK.weight if layer.path in {marked.path for marked in marks} else None)
        made = passes.compile(copy, "round_weights(method='nearest')")
        logits = [torch.cat([model(input_ids=batch[0]).logits.detach() for batch in held]) for model in (made, load(family).model)]
        assert measured == pytest.approx(float(divergence(*logits)), rel=1e-3, abs=1e-6)
    assert found[-1] == pytest.approx(0, abs=1e-6)


def test_codes_are_made_once_and_are_integers():
    gm, ctx, linears = prepared()
    trial = Trial(gm, ctx, ctx.calibration, GPTQ(sweeps=0))
    first = trial.divergences([{linears[0]: MARK}])
    codes = dict(trial.codes)
    assert all(tensor.dtype in {torch.int8, torch.uint8} for tensor, *_ in codes.values())
    assert trial.divergences([{}, {linears[0]: MARK}])[1:] == first
    assert all(trial.codes[pair] is codes[pair] for pair in codes)


def test_codes_are_on_disk_where_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 1)
    gm, ctx, linears = prepared()
    variants = [dict.fromkeys(linears, MARK), dict.fromkeys(linears[3:], MARK)]
    plain = Trial(gm, ctx, ctx.calibration, Nearest())
    expected = plain.divergences(variants)
    own = gm.meta[edit.STORE] = Store(tmp_path)
    kept = Trial(gm, ctx, ctx.calibration, Nearest())
    assert kept.divergences(variants) == expected
    assert len(kept.codes) == len(plain.codes) > 10
    assert all(own.holds(codes) for codes, *_ in kept.codes.values())


def test_outputs_that_are_no_logits_are_measured_by_their_distance():
    calibration = [(vectors(seed=seed),) for seed in (1, 2)]
    gm = passes.compile(Mlp(), "canonicalize", calibration, args=(vectors(),)).graph
    ctx = context(gm, calibration)
    linears = layers(gm)
    down, both = Trial(gm, ctx, ctx.calibration, Nearest()).divergences([{linears[1]: MARK}, dict.fromkeys(linears, MARK)])
    assert 0.01 < down < both < 1


def test_what_is_held_out_is_not_known():
    gm = load("llama").graph()
    ctx = context(gm, CALIBRATION)
    known, held = hold_out(ctx, 60, seed=3)
    rows = [{tuple(row.tolist()) for batch in side for row in batch[0]} for side in (known.calibration, held)]
    assert not rows[0] & rows[1]
    assert len(rows[1]) == 3 and len(rows[0] | rows[1]) == 8
    again = hold_out(ctx, 60, seed=3)[1]
    assert all(torch.equal(a, b) for one, other in zip(held, again, strict=True) for a, b in zip(one, other, strict=True))
    assert len(ctx.calibration[0][0]) == 4
    most = hold_out(ctx, 10_000, seed=3)[1]
    assert sum(len(batch[0]) for batch in most) == 4  # half
    assert hold_out(ctx, 0, seed=3) == (ctx, [])


def test_one_sample_cannot_be_divided():
    gm = load("llama").graph()
    ctx = context(gm, [{"input_ids": CALIBRATION[0]["input_ids"][:1]}])
    known, held = hold_out(ctx, 60, seed=0)
    assert torch.equal(known.calibration[0][0], held[0][0])


def test_inputs_are_rounded_where_the_mark_says_so():
    gm, ctx, linears = prepared()
    half = dict.fromkeys(linears[:5], Form.parse("i8[1,-1]/i4[1,-1]dynamic*0.9"))
    (measured,) = Trial(gm, ctx, ctx.calibration, Nearest()).divergences([half])
    copy = edit.copied(gm)
    for layer, mark in zip(layers(copy)[1:6], half.values(), strict=True):
        layer.annotate(mark)
    made = passes.compile(copy, "round_weights(method='nearest'), quantize")
    logits = [torch.cat([model(input_ids=batch[0]).logits.detach() for batch in ctx.calibration]) for model in (made, load("llama").model)]
    assert measured == pytest.approx(float(divergence(*logits)), rel=1e-3)
    run(gm, "annotate(scheme='W8A4'), quantize(weights=False)")  # what is rounded already is not rounded again
    linears = [layer for layer in layers(gm) if layer.kind == "Linear" and layer.input_rounded]
    mark = next(iter(half.values()))
    first, second = dict.fromkeys(linears, Form(None, mark.weight)), dict.fromkeys(linears, mark)
    found = Trial(gm, ctx, ctx.calibration, Nearest()).divergences([first, second])
    assert found[0] == found[1]
