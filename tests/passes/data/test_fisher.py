import pytest
import torch
from torch import nn

from ir import edit, evaluate
from ir.capture import capture
from ir.sites import layers
from passes.data import fisher
from passes.data.fisher import Factors, Kronecker, kronecker_factors, token_weights
from passes.data.gradients import output_sensitivity
from tests.families import load
from tests.passes.samples import CALIBRATION, context, run, tokens, vectors


def prepared(family="llama", calibration=CALIBRATION):
    gm = load(family).graph()
    _, ctx = run(gm, "canonicalize, untie", calibration)
    return gm, ctx, {layer.node: layer for layer in layers(gm) if layer.kind == "Linear"}


def test_weights_of_tokens_are_the_mean_squared_gradients_of_groups():
    gm, ctx, linears = prepared(calibration=[{"input_ids": tokens(8, 24, seed)} for seed in range(4)])
    weights = token_weights(gm, ctx, linears, groups=3)
    # Other draws of the same expectation: only the means agree.
    means = output_sensitivity(gm, ctx, linears, tokens=8 * 24 * 4, seed=1)
    for node, found in weights.items():
        N = edit.value(node).shape[-1]
        assert [list(w.shape) for w in found] == [[8 * 24, 3]] * 4
        assert all((w >= 0).all() for w in found)
        sizes = torch.tensor([N * (g + 1) // 3 - N * g // 3 for g in range(3)])
        assert float((torch.cat(found).mean(0) * sizes).sum()) == pytest.approx(float(means[node].sum()), rel=0.2)


def test_factors_are_moments_of_the_gradients_of_tokens():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 2, generator=generator)
    sums = Kronecker.empty(2, 4)
    for part in (slice(0, 2), slice(2, 3)):
        sums.take(x[part], g[part])
    G = torch.einsum("stn,stk->stnk", g, x).flatten(0, 1)
    outer, inner = sums.factors()
    torch.testing.assert_close(outer, torch.einsum("tnk,tmk->nm", G, G) / 15)
    torch.testing.assert_close(inner, torch.einsum("tnk,tnl->kl", G, G) / G.square().sum())


class Square(nn.Module):
    """One linear whose outputs are compared as they are: the Fisher information is `I ⊗ E[xxᵀ]`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.linear(x)


def test_factors_of_a_linear_model_are_known():
    gm = capture(Square(), args=(vectors(width=8),))
    x = vectors(rows=20000, width=8) * torch.linspace(0.5, 2, 8)
    ctx = context(gm, [x])
    (layer,) = layers(gm)
    ((outer, inner),) = kronecker_factors(gm, ctx, [layer.node]).values()
    gram = x.T @ x / len(x)
    torch.testing.assert_close(outer, gram.trace() * torch.eye(6), atol=0.05 * float(gram.trace()), rtol=0)
    torch.testing.assert_close(inner, gram / gram.trace(), atol=0.02, rtol=0)


def test_factors_tell_the_divergence_of_a_small_change_up_to_what_tokens_have_in_common():
    gm, ctx, linears = prepared(calibration=[{"input_ids": tokens(8, 24, seed)} for seed in range(16)])
    (layer,) = [layer for layer in linears.values() if layer.path.endswith("0.mlp.down_proj")]
    outer, inner = kronecker_factors(gm, ctx, [layer.node])[layer.node]
    D = torch.randn(*edit.value(layer.weight).shape, generator=torch.Generator().manual_seed(0))
    D *= 0.05 / (outer @ D * (D @ inner)).sum().sqrt()
    nodes, out = [node for node in gm.graph.nodes if node.op == "call_function"], gm.graph.output_node().args[0][0]

    def moved(x, weight, bias=None):
        return nn.functional.linear(x, weight + D, bias)

    changed = []
    for batch in ctx.calibration:
        given = evaluate.bind(gm, batch)
        exact = evaluate.evaluate(gm, nodes, given, [out])[out].double().log_softmax(-1)
        found = evaluate.evaluate(gm, nodes, given, [out], instead={layer.node: moved})[out].double().log_softmax(-1)
        changed.append((exact.exp() * (exact - found)).sum(-1).mean())
    assert 0.9 < float(torch.stack(changed).mean()) / (0.5 * 0.05**2) < 1.6


def test_the_graph_is_left_alone_and_the_seed_decides():
    gm, ctx, linears = prepared("gpt2")
    before = [str(node.format_node()) for node in gm.graph.nodes]
    first, second = (kronecker_factors(gm, ctx, linears) for _ in range(2))
    assert [str(node.format_node()) for node in gm.graph.nodes] == before
    assert all(torch.equal(a, b) for node in linears for a, b in zip(first[node], second[node], strict=True))
    assert all(parameter.grad is None for parameter in gm.parameters())


@pytest.mark.parametrize(("room", "runs"), [(1, 15), (10**9, 1)])
def test_factors_are_those_of_the_model_before_rounding_however_many_have_room(monkeypatch, room, runs):
    gm, ctx, linears = prepared()
    expected, seen = kronecker_factors(gm, ctx, linears), []
    monkeypatch.setattr(fisher, "ROOM", room)
    monkeypatch.setattr(fisher, "SHARE", 10**9)
    monkeypatch.setattr(fisher, "kronecker_factors", lambda *given: seen.append(given[2]) or kronecker_factors(*given))
    factors = Factors(gm, ctx, linears)
    for node, layer in linears.items():
        for found, exact in zip(factors.take(node), expected[node], strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()))
        edit.set_attribute(gm, layer.weight, torch.zeros_like(edit.attribute(gm, layer.weight)))
    assert (len(seen), factors.known) == (runs, {})
