import torch
from torch import nn

from ir.capture import capture
from ir.encoding import Encoding
from ir.sites import layers
from ir.text import graph_text, where


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)

    def forward(self, x):
        return torch.nn.functional.silu(self.up(x))


def test_a_graph_prints_as_lines():
    gm = capture(Gate(), args=(torch.randn(2, 4),))
    layers(gm)[0].site("weight").annotate(Encoding.parse("i8[1,-1]"))
    assert graph_text(gm).splitlines() == [
        "%x: float32[?, 4]",
        "%1 = aten.linear(%x, %up.weight): float32[?, 8] {weight: i8[1,-1]}",
        "%2 = aten.silu(%1): float32[?, 8]",
        "return [%2]",
    ]
    assert "{" not in graph_text(gm, annotations=False)


def test_text_does_not_depend_on_the_names_of_nodes(families):
    family = families("llama")
    gm = family.graph()
    text = graph_text(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.name = f"other_{node.name}"
    assert graph_text(gm) == text


def test_a_node_says_where_it_came_from(families):
    layer = layers(families("llama").graph())[1]
    assert "module model.layers.0.self_attn.q_proj" in where(layer.node)
    assert "modeling_llama.py" in where(layer.node)
