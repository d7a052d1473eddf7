import pytest

from ir.match import aten, find
from tests.passes.maps import OPENED, kept


@pytest.mark.parametrize(("family", "norms"), [("gpt2", 5), ("opt", 5), ("gpt_neox", 5), ("llama", 0)])
def test_layer_norms_become_rms_norms(family, norms):
    gm, records, _, error = kept(family, OPENED)
    assert records[-1].sites == norms
    assert not find(gm, aten.layer_norm.default)
    assert len(find(gm, aten.rms_norm.default)) == 5
    assert error < 1e-5


def test_norms_after_the_residual_stream_are_kept_with_a_reason():
    gm, records, ctx, _ = kept("bert", OPENED)
    assert records[-1].sites == 0
    assert len(find(gm, aten.layer_norm.default)) == 6
    assert any("center_norm: kept" in note and "a norm has a bias" in note for note in ctx.notes)


def test_norms_with_biases_need_fold_norm():
    _, records, ctx, _ = kept("gpt2", "canonicalize, untie, center_norm")
    assert records[-1].sites == 0
    assert any("run fold_norm first" in note for note in ctx.notes)
