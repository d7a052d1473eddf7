from copy import deepcopy

import pytest
import torch

from ir.capture import capture
from ir.errors import DataError
from tests.families import VOCABULARY, build
from tools.outliers import gated, inputs, plant, plant_tokens

GATED = ("llama", pytest.param("phi3", marks=pytest.mark.thorough))  # phi3 writes both branches by one linear


def ids(seed=0):
    return torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GATED)
def test_the_function_stays_and_channels_become_massive(name):
    model = build(name)
    planted = deepcopy(model)
    pairs = plant(planted, ids(), channels=2, low=50, high=100)
    with torch.no_grad():
        a, b = (each(input_ids=ids(1)).logits for each in (model, planted))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
    graphs = [capture(each) for each in (model, planted)]
    before, after = ([x.flatten(0, 1) for x in inputs(gm, gated(gm), ids()).values()] for gm in graphs)
    assert len(pairs) == 2
    for x, y, chosen in zip(before, after, pairs.values(), strict=True):
        factors = torch.ones(x.shape[1])
        for channel, factor in chosen:
            assert 50 <= factor <= 100
            factors[channel] = factor
        torch.testing.assert_close(y, x * factors, rtol=1e-2, atol=1e-3 * float(y.abs().max()))


def test_layers_numbers_and_tails_can_be_chosen_and_the_seed_decides():
    gm = capture(build("llama"))
    node = gated(gm)[-1]
    x = inputs(gm, [node], ids())[node].flatten(0, 1).abs()
    tail = x.topk(10, 0).values.mean(0) / x.mean(0)
    first, again, other = (plant(build("llama"), ids(), channels=3, tokens=10, layers=[-1], seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert {path: [channel for channel, _ in pairs] for path, pairs in first.items()} == {
        "model.layers.1.mlp.down_proj": tail.topk(3).indices.tolist()
    }


def test_massive_tokens_are_few_and_cancel_in_the_output():
    model = build("llama")
    planted = deepcopy(model)
    sample = ids()
    sample[:, ::6] = 7
    pairs = plant_tokens(planted, sample, share=1 / 6, size=1e4, layers=[0])
    gm = capture(planted)
    node = gated(gm)[0]
    first, second = pairs["model.layers.0.mlp.down_proj"]
    x = inputs(gm, [node], sample)[node]
    torch.testing.assert_close(x[..., first], x[..., second])
    massive = x[..., first].abs()
    assert float(massive[sample == 7].min()) > 10 * float(massive[sample != 7].max())
    assert float(massive.max()) == pytest.approx(1e4, rel=0.3)
    W = planted.model.layers[0].mlp.down_proj.weight
    assert torch.equal(W[:, first], -W[:, second])


def test_models_without_gates_are_refused():
    model = build("gpt2")
    with pytest.raises(DataError, match="product"):
        plant(model, ids())
