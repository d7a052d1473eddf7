import pytest
import torch

from ir import edit
from ir.sites import layers

aten = torch.ops.aten


def test_an_emitted_node_has_a_value_and_a_provenance(families):
    gm = families("llama").graph()
    layer = layers(gm)[1]
    node = edit.emit(gm, aten.neg.default, (layer.node,), before=layer.node.next, like=layer.node)
    assert node.meta["val"].shape == layer.node.meta["val"].shape
    assert edit.module_path(node) == "model.layers.0.self_attn.q_proj"


def test_replacing_moves_readers_and_erases(families):
    gm = families("llama").graph()
    node = layers(gm)[1].node
    readers = list(node.users)
    new = edit.emit(gm, aten.neg.default, (node,), before=node.next)
    new.args = (node.args[0],)
    edit.replace(node, new)
    assert list(new.users) == readers
    assert node not in gm.graph.nodes


def test_setting_an_attribute_leaves_the_callers_tensor_alone(families):
    family = families("llama")
    gm = family.graph()
    layer = layers(gm)[1]
    before = edit.attribute(gm, layer.weight).clone()
    edit.set_attribute(gm, layer.weight, torch.zeros(64, 64))
    assert torch.equal(family.model.model.layers[0].self_attn.q_proj.weight, before)
    assert not edit.attribute(gm, layer.weight).any()


def test_names_are_made_unique(families):
    gm = families("llama").graph()
    layer = layers(gm)[1]
    node = edit.add_attribute(gm, str(layer.weight.target), torch.zeros(2, dtype=torch.int8), before=layer.node)
    assert node.target == "model.layers.0.self_attn.q_proj.weight_1"
    assert str(node.target) in dict(gm.named_buffers())


def test_cleaning_drops_unread_nodes_and_their_tensors(families):
    gm = families("llama").graph()
    layer = layers(gm)[1]
    edit.add_attribute(gm, "extra.thing", torch.zeros(2), before=layer.node)
    edit.emit(gm, aten.neg.default, (layer.node,), before=layer.node.next)
    count = len(gm.graph.nodes)
    edit.clean(gm)
    assert len(gm.graph.nodes) <= count - 2
    assert "extra.thing" not in dict(gm.named_parameters())


def test_a_dropped_attribute_releases_its_tensor(families):
    gm = families("llama").graph()
    layer = layers(gm)[1]
    node = edit.add_attribute(gm, "extra.thing", torch.zeros(2), before=layer.node)
    edit.drop(gm, node)
    with pytest.raises(AttributeError):
        _ = gm.extra.thing


def test_inputs_and_outputs_are_added_and_changed(families):
    gm = families("gpt2").graph()
    past = gm.graph.find_nodes(op="placeholder")[-1]
    batch, heads, tokens, width = edit.value(past).shape
    added = edit.add_input(gm, "more", (batch, heads, tokens, 1), torch.float16, after=past)
    assert (edit.value(added).dtype, edit.value(added).shape) == (torch.float16, (batch, heads, tokens, 1))
    edit.set_input(past, (batch, heads, tokens, width // 2), torch.uint8)
    assert (edit.value(past).dtype, edit.value(past).shape[3]) == (torch.uint8, width // 2)
    edit.set_outputs(gm, [added, past])
    assert gm.graph.output_node().args == ((added, past),)
    assert gm.graph.find_nodes(op="placeholder")[-1] is added
