import pytest
import torch

from backends.hf.norms import norm_vectors
from backends.hf.shapes import empty
from ir import edit
from ir.match import NORMS, find, operand
from tests.families import load
from tests.passes.samples import run


def vectors(family, pipeline, stored=()):
    gm = load(family).graph()
    run(gm, f"canonicalize, {pipeline}")
    return gm, norm_vectors(gm, empty(gm.meta["config"], gm.meta["architecture"]), dict.fromkeys(stored))


@pytest.mark.parametrize(
    ("family", "values"),
    [("llama", {"weight": 1}), ("gemma2", {"weight": 0}), ("gpt2", {"weight": 1, "bias": 0})],
)
def test_norms_without_gain_are_what_the_class_calls_that(family, values):
    gm, found = vectors(family, "untie, fold_norm")
    path = next(edit.module_path(node) for node in find(gm, *NORMS) if operand(node, "weight") is None)
    for name, value in values.items():
        assert torch.equal(found[f"{path}.{name}"], torch.full((64,), float(value)))


def test_a_layer_norm_whose_mean_is_folded_is_one_still():
    gm, found = vectors("gpt2", "untie, fold_norm, center_norm")
    assert any(node.target is torch.ops.aten.rms_norm.default for node in find(gm, *NORMS))
    assert all(torch.equal(vector, torch.full((64,), float(name.endswith("weight")))) for name, vector in found.items())


def test_gains_that_a_pass_changed_are_solved_for():
    gm, _ = vectors("gemma2", "untie")
    node = next(node for node in find(gm, *NORMS) if edit.module_path(node) == "model.norm")
    gain = torch.linspace(0.5, 2, 64)
    edit.set_attribute(gm, operand(node, "weight"), gain)
    found = norm_vectors(gm, empty(gm.meta["config"], gm.meta["architecture"]), {})
    torch.testing.assert_close(found["model.norm.weight"], gain - 1, atol=1e-5, rtol=0)


def test_what_is_stored_is_left_alone():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    stored = {str(node.target): edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    assert norm_vectors(gm, empty(gm.meta["config"], gm.meta["architecture"]), stored) == {}
