import pytest
import torch

from ir import edit, evaluate
from ir.sites import layers
from passes.data.gradients import output_sensitivity, total_gradients
from tests.families import load
from tests.passes.samples import context, run, tokens

BATCHES = [{"input_ids": tokens(8, 24, seed)} for seed in range(8)]


@pytest.mark.parametrize("end", ["0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.up_proj", "1.mlp.down_proj"])
def test_sensitivity_predicts_the_divergence_of_a_small_change(end):
    gm = load("llama").graph()
    run(gm, "canonicalize, untie")
    ctx = context(gm, BATCHES)
    (layer,) = [layer for layer in layers(gm) if layer.path.endswith(end)]
    h = output_sensitivity(gm, ctx, [layer.node], tokens=4096)[layer.node]
    # Independent noise on the layer's output: a bias would move all tokens together.
    generator = torch.Generator().manual_seed(0)
    size = 0.05 / float(h.sum().sqrt())
    changed = []
    for batch in ctx.calibration:
        nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
        out = gm.graph.output_node().args[0][0]

        def noisy(x, weight, bias=None):
            y = torch.nn.functional.linear(x, weight, bias)
            return y + size * torch.randn(y.shape, generator=generator)

        given = evaluate.bind(gm, batch)
        exact = evaluate.evaluate(gm, nodes, given, [out])[out].double().log_softmax(-1)
        found = evaluate.evaluate(gm, nodes, given, [out], instead={layer.node: noisy})[out].double().log_softmax(-1)
        changed.append((exact.exp() * (exact - found)).sum(-1).mean())
    predicted = 0.5 * float(h.sum()) * size**2
    assert float(torch.stack(changed).mean()) == pytest.approx(predicted, rel=0.25)


def test_the_callers_model_gets_no_gradients():
    gm = load("llama").graph()
    for parameter in gm.parameters():
        parameter.requires_grad_(True)
    ctx = context(gm, BATCHES[:1])
    output_sensitivity(gm, ctx, [layer.node for layer in layers(gm) if layer.kind == "Linear"], tokens=64)
    assert all(parameter.grad is None for parameter in gm.parameters())


def test_the_same_seed_draws_the_same():
    gm = load("gpt2").graph()
    ctx = context(gm, BATCHES[:2])
    nodes = [layer.node for layer in layers(gm) if layer.kind == "Linear"]
    first, second = (output_sensitivity(gm, ctx, nodes, tokens=64, seed=3) for _ in range(2))
    assert all(torch.equal(first[node], second[node]) for node in nodes)
    assert all(edit.value(node).shape[-1] == len(first[node]) for node in nodes)


def test_values_come_with_their_gradients_rounded_activations_or_not():
    gm = load("llama").graph()
    run(gm, "canonicalize, untie")
    ctx = context(gm, BATCHES[:2])
    rounded = load("llama").graph()
    run(rounded, "canonicalize, untie, annotate(scheme='W8A4'), quantize(weights=False)")
    found = []
    for graph in (gm, rounded):
        (layer,) = [layer for layer in layers(graph) if layer.path.endswith("1.mlp.up_proj")]
        seen = []
        _, count = total_gradients(graph, ctx, [layer.node], list, lambda _, *given, seen=seen: seen.append(given), tokens=96, seed=2)
        assert count == sum(value[..., 0].numel() for _, value, _ in seen) == 96
        assert all(node is layer.node and value.shape == gradient.shape for node, value, gradient in seen)
        found.append([tensor for _, *pair in seen for tensor in pair])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(float(tensor.abs().max()) > 0 for tensor in found[0])
