import pytest
import torch

from ir.capture import capture
from passes.learning.mask_learning import MaskLearning
from passes.pruning.kinds import ALL, KINDS
from passes.pruning.prunable import found_units
from passes.pruning.unit_masks import mask_scores
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, context, run, vectors


def test_units_that_do_nothing_are_found():
    model = Mlp().requires_grad_(False)
    idle = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    model.down.weight[:, idle] = 0
    gm = capture(model, (vectors(),))
    run(gm, "canonicalize")
    units, _ = found_units(gm, KINDS, ())
    learning = MaskLearning(steps=80, rate=0.05, seed=0, rows=64, strength=0.3)
    (score,) = mask_scores(gm, context(gm, [(vectors(rows=512),)]), units, 0.5, learning)
    dropped = set(score.argsort()[:64].tolist())
    assert len(dropped & set(idle.tolist())) >= 60


@pytest.mark.parametrize("what", [("mlp", "heads"), ("inputs", "outputs"), ("blocks",)])
def test_gates_of_all_kinds_have_gradients(what):
    gm = load("llama").graph()
    run(gm, "canonicalize")
    units, _ = found_units(gm, what, ())
    before, after = (
        mask_scores(gm, context(gm, CALIBRATION), units, 0.3, MaskLearning(steps, rate=0.01, seed=0, rows=1, strength=0.0))
        for steps in (0, 2)
    )
    assert [len(score) for score in after] == [own.size for own in units]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(what) <= set(ALL)
