from itertools import pairwise

import pytest
import torch

from backends.onnx_qdq.cuts import opened, parts, port_of, seams
from ir import evaluate
from tests.families import DISTINCT, load


@pytest.mark.parametrize("family", DISTINCT)
def test_parts_are_a_chain_that_computes_the_graph(family):
    gm = load(family).graph()
    found = parts(gm)
    assert found[0].entry == ()
    outputs = gm.graph.output_node().args[0]
    for before, after in pairwise(found):
        assert set(after.entry) <= set(before.exit)
    assert {node for part in found for node in part.exit} == {*outputs, *seams(found)}


def test_parts_are_called_as_the_modules_are():
    labels = [part.label for part in parts(load("llama").graph())]
    layers = [f"model.layers.{index}.{name}" for index in (0, 1) for name in ("self_attn", "mlp")]
    assert labels == ["model.embed_tokens", *layers, "lm_head"]


def test_an_opened_graph_returns_further_values():
    gm = load("llama").graph()
    cuts = seams(parts(gm))
    given = list(evaluate.run(gm, gm.meta["example"]))
    more = evaluate.run(opened(gm, cuts), gm.meta["example"])
    assert len(more) == len(given) + len(cuts)
    assert all(torch.equal(a, b) for a, b in zip(more, given, strict=False))
    assert port_of(cuts[0]).shape == (None, None, 64)
    assert len(gm.graph.output_node().args[0]) == len(given)
