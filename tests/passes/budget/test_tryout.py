import pytest
import torch

from ir import edit
from ir.sites import layers
from passes.annotate import Annotate
from passes.base import Context
from passes.budget.tryout import promising, try_out
from passes.data.calibration import tokens_in
from passes.learning.divergence import divergence, teacher
from passes.pipeline import Pipeline
from tests.families import load
from tests.passes.samples import CALIBRATION, run


def test_only_what_another_choice_beats_in_both_is_ruled_out():
    assert promising([1.0, 0.9, 0.8, 0.7], [0.4, 0.3, 0.35, 0.2]) == [0, 1, 3]
    assert promising([0.5, 0.5, 0.5], [0.3, 0.2, 0.2]) == [1]
    assert promising([0.1, 1.0], [0.2, 0.1]) == [1]


def test_the_graph_and_the_context_stay_as_they_were():
    gm = load("llama").graph()
    _, ctx = run(gm, "canonicalize, untie", CALIBRATION)
    before = {layer.path: edit.attribute(gm, layer.weight).clone() for layer in layers(gm)}
    finish = Pipeline.parse("round_weights(method='nearest')")

    def change(copy, own: Context):
        assert copy is not gm
        own.notes.append("only here")
        return Annotate("W4A16", group=32).run(copy, own)

    held = list(ctx.calibration)
    four = try_out(gm, ctx, held, change, finish)
    assert four == try_out(gm, ctx, held, change, finish) > 0
    assert try_out(gm, ctx, held, lambda copy, own: None, Pipeline()) == pytest.approx(0, abs=1e-9)
    assert try_out(gm, ctx, held, lambda copy, own: Annotate("W8A16", group=32).run(copy, own), finish) < four
    assert all(torch.equal(edit.attribute(gm, layer.weight), before[layer.path]) for layer in layers(gm))
    assert all(layer.site("weight").encoding is None for layer in layers(gm)) and "only here" not in ctx.notes
    Annotate("W4A16", group=32).run(gm, ctx)
    was = teacher(load("llama").graph())
    Pipeline.parse("round_weights(method='nearest')").execute(gm, ctx)
    total = sum(tokens_in(batch) * float(divergence(teacher(gm)(batch)[0], was(batch)[0])) for batch in held)
    assert four == pytest.approx(total / sum(map(tokens_in, held)), rel=1e-3)
