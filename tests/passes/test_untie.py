import torch
from torch import nn

from ir import edit
from ir.capture import capture
from ir.sites import layers
from tests.families import load
from tests.passes.samples import Mlp, run, vectors


def weight_of(gm, path):
    (layer,) = [layer for layer in layers(gm) if layer.path == path]
    return edit.attribute(gm, layer.weight)


def untied(family):
    gm = load(family).graph()
    (record,), _ = run(gm, "untie")
    return gm, record


def test_a_tied_head_gets_a_weight_of_its_own_without_a_copy():
    gm, record = untied("llama_tied")
    embedding, head = weight_of(gm, "model.embed_tokens"), weight_of(gm, "lm_head")
    assert (record.sites, record.difference) == (1, 0.0)
    assert embedding is not head
    assert embedding.data_ptr() == head.data_ptr()


def test_a_change_for_one_reader_leaves_the_other_alone():
    gm, _ = untied("llama_tied")
    (head,) = [layer for layer in layers(gm) if layer.path == "lm_head"]
    edit.set_attribute(gm, head.weight, torch.zeros_like(weight_of(gm, "lm_head")))
    assert torch.equal(weight_of(gm, "model.embed_tokens"), load("llama_tied").model.lm_head.weight)


def test_separate_weights_stay():
    _, record = untied("llama")
    assert record.sites == 0


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.inner = Mlp()

    def forward(self, x):
        return self.inner(self.inner(x))


def test_a_layer_called_twice_becomes_two():
    model = Twice()
    gm = capture(model, args=(vectors(),))
    (record, again), _ = run(gm, "untie, untie")
    assert (record.sites, again.sites) == (2, 0)
    names = [str(layer.weight.target) for layer in layers(gm)]
    assert len(set(names)) == 4
    assert [layer.path for layer in layers(gm)] == ["inner.up", "inner.down", "inner.up#2", "inner.down#2"]
    assert torch.equal(gm(vectors())[0], model(vectors()))
