import pytest
import torch

from ir import edit
from ir.errors import PassError
from ir.match import aten, is_call, operand
from ir.residual import branches, drop
from ir.verify import verify
from passes.probe import relative_error
from tests.families import LAYERS, load
from tests.passes.samples import run


def prepared(name):
    gm = load(name).graph()
    run(gm, "canonicalize")
    return gm


def attends(branch):
    return any(is_call(node, aten.scaled_dot_product_attention.default, aten.softmax.int) for node in branch.nodes)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "bert"])
def test_attentions_and_mlps_are_branches(name):
    found = branches(prepared(name))
    if name == "gpt_neox":  # one branch a layer, of both side by side
        assert [attends(branch) for branch in found] == [True] * LAYERS
        return
    assert [attends(branch) for branch in found] == [True, False] * LAYERS
    assert all(len(branch.last) == 1 for branch in found)
    assert [len(branch.first) for branch in found[:2]] in ([3, 2], [3, 1], [1, 1])


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "gpt_neox"])
def test_what_is_left_equals_its_masked_twin(name):
    gm, twin = prepared(name), prepared(name)
    ends = {0, len(branches(gm)) - 1} if name != "gpt_neox" else {0}
    before = gm.meta["example"]
    convert = drop(gm, [branch for index, branch in enumerate(branches(gm)) if index in ends])
    for index, branch in enumerate(branches(twin)):
        for layer in branch.last if index in ends else ():
            for node in (layer.weight, operand(layer.node, "bias")):
                if node is not None:
                    edit.set_attribute(twin, node, torch.zeros_like(edit.attribute(twin, node)))
    edit.clean(gm)
    verify(gm)
    after, expected = (load(name).steps(each, lengths=(7, 1, 1)) for each in (gm, twin))
    assert max(relative_error((a,), (b,)) for a, b in zip(after, expected, strict=True)) < 1e-5
    assert [len(convert(before)), len(gm.meta["example"])] == [len(gm.meta["signature"].inputs)] * 2


def test_caches_that_are_left_are_counted_anew():
    gm = prepared("llama")
    drop(gm, branches(gm)[:1])
    signature = gm.meta["signature"]
    assert [port.name for port in signature.inputs if port.cached] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [port.name for port in signature.outputs if port.cached] == ["present.0.key", "present.0.value"]


def test_one_attention_stays():
    gm = prepared("llama")
    with pytest.raises(PassError, match="no attention would be left"):
        drop(gm, [branch for branch in branches(gm) if attends(branch)])
