import pytest
import torch
from torch import nn

from ir.blocks import blocks
from ir.capture import capture
from ir.evaluate import bind, evaluate, run
from ir.sites import QUANTIZABLE


def linears(block):
    return sum("linear" in str(node.target) for node in block.nodes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [0, 4, 3, 4, 3, 1]),  # embedding, attention, MLP, attention, MLP, head
        ("gemma3", [0, 4, 3, 4, 3, 1]),
        ("gpt_neox", [0, 4, 4, 1]),  # attention and MLP in parallel are one block
        ("phi3", [0, 2, 2, 2, 2, 1]),
    ],
)
def test_a_transformer_is_cut_at_its_residual_stream(families, name, expected):
    _, cut = blocks(families(name).graph())
    assert [linears(block) for block in cut] == expected
    assert all(len(block.entry) <= 1 and len(block.exit) <= 1 for block in cut)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "bert"])
@torch.no_grad()
def test_running_block_by_block_is_running_the_graph(families, name):
    gm = families(name).graph()
    outside, cut = blocks(gm)
    inputs = gm.meta["example"]
    given = bind(gm, inputs)
    outer = evaluate(gm, outside, given, list(outside))
    stream: dict = {}
    for block in cut[:-1]:
        assert set(block.entry) <= set(stream)
        stream = evaluate(gm, block.nodes, {**given, **outer, **stream}, block.exit)
    logits = gm.graph.output_node().args[0][0]
    last = evaluate(gm, cut[-1].nodes, {**given, **outer, **stream}, [logits])[logits]
    assert torch.equal(last, run(gm, inputs)[0])


def test_every_layer_is_in_exactly_one_block(families):
    gm = families("bert").graph()
    _, cut = blocks(gm)
    inside = [node for block in cut for node in block.nodes if node.target in QUANTIZABLE]
    assert inside == [node for node in gm.graph.nodes if node.target in QUANTIZABLE]


def test_a_chain_is_cut_at_every_layer():
    gm = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), args=(torch.randn(2, 4),))
    assert [linears(block) for block in blocks(gm)[1]] == [1, 1, 1]


def test_a_graph_without_layers_has_no_blocks():
    assert blocks(capture(nn.ReLU(), args=(torch.randn(2, 4),)))[1] == []
