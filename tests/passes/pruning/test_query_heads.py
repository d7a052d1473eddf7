import torch

from ir import edit
from passes.probe import relative_error
from passes.pruning.kinds import QUERY_HEADS, heads_of
from passes.pruning.prunable import found_units
from passes.pruning.query_heads import lined_up
from tests.families import load
from tests.passes.samples import run


def test_lining_up_keeps_the_function_and_brings_the_best_first():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    before = load("llama").steps(gm)
    units, left = found_units(gm, [QUERY_HEADS], ())
    assert [(own.size, own.rows) for own in units] == [(2, 2), (2, 2)]
    assert "only copies of it are dropped" in left
    weight = edit.attribute(gm, units[0].readers[0][0].weight).clone()
    score = lined_up(gm, units[0], torch.tensor([1.0, 3.0, 5.0, 2.0]))  # of heads 0 and 1 of the first group, then of the second
    assert score.tolist() == [8.0, 3.0]
    after = edit.attribute(gm, units[0].readers[0][0].weight)
    assert torch.equal(after[:, :16], weight[:, 16:32])
    assert torch.equal(after[:, 32:], weight[:, 32:])
    assert max(relative_error((a,), (b,)) for a, b in zip(load("llama").steps(gm), before, strict=True)) < 1e-5


def test_places_of_heads():
    assert heads_of(torch.tensor([0, 0, 1, 1, -1, 0, 0, 1, 1]), 2, 2).tolist() == [0, 0, 1, 1, -1, 2, 2, 3, 3]
