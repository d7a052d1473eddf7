import pytest
import torch

import passes
from ir import evaluate
from ir.errors import DataError, OptionError
from passes.sample_text import SampleText
from tests.families import VOCABULARY, load
from tests.passes.samples import CALIBRATION, Mlp, context, run, vectors


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_as_much_text_is_added_as_was_given(family):
    gm = load(family).graph()
    ctx = context(gm, CALIBRATION)
    given = [list(batch) for batch in ctx.calibration]
    records, _ = run(gm, "canonicalize, sample_text", ctx=ctx)
    assert records[-1].sites == 8
    assert len(ctx.calibration) == 4
    assert all(torch.equal(a, b) for a, b in zip(given[0], ctx.calibration[0], strict=True))
    own = ctx.calibration[1][0]
    assert own.shape == (given[0][0].shape[0], given[0][0].shape[1] // 2)
    assert own.min() >= 0 and own.max() < VOCABULARY and len(own.unique()) > 8
    assert any("written by the model" in note for note in ctx.notes)


def test_draws_follow_the_models_predictions():
    gm = load("llama").graph()
    _, ctx = run(gm, "canonicalize, sample_text(windows=6, length=20, temperature=0.001)")
    for batch in ctx.calibration:
        logits = evaluate.run(gm, batch)[0]
        assert torch.equal(logits[:, :-1].argmax(-1), batch[0][:, 1:])


def test_the_same_seed_writes_the_same():
    texts = (f"canonicalize, sample_text(windows=2, length=9, seed={seed})" for seed in (1, 1, 2))
    first, second, other = (run(load("llama").graph(), text)[1].calibration[0][0] for text in texts)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_cannot_write_is_refused():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), "sample_text")
    with pytest.raises(OptionError, match="causal"):
        run(load("bert").graph(), "canonicalize, sample_text", CALIBRATION)
    with pytest.raises(OptionError, match="causal"):
        passes.compile(Mlp(), "sample_text", [(vectors(),)], args=(vectors(),))
    with pytest.raises(OptionError):
        SampleText(length=1)
