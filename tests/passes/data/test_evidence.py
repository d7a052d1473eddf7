import pytest
import torch

from ir.rounding import METHODS, propagate_error
from ir.rounding.evidence import PARTS
from ir.sites import layers
from passes.data import evidence, prefix
from tests.families import load
from tests.passes.samples import CALIBRATION, run


def prepared():
    gm = load("llama").graph()
    _, ctx = run(gm, "canonicalize, untie, annotate(scheme='W4A8'), quantize(weights=False)", CALIBRATION)
    return gm, ctx, {layer.node: layer for layer in layers(gm) if layer.path.endswith("_proj")}


def each(*given):
    """All linears and what is known about them."""
    for group in evidence.gather(*given):
        yield from group.known()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs])
@pytest.mark.parametrize("propagation", [0.0, 0.5])
def test_a_method_gets_what_it_needs_and_no_more(name, propagation):
    method, seen = METHODS[name](), []
    for layer, known, W in each(*prepared(), method, propagation):
        known.check(name, method.needs, W.shape)
        found = {part for part in PARTS if getattr(known, part) is not None}
        assert found - {"gram"} == set(method.needs) - {"gram"}
        seen.append(layer.path)
    assert len(set(seen)) == 14


def test_gradients_alone_ask_for_no_inputs(monkeypatch):
    monkeypatch.setattr(evidence, "Prefix", None)
    assert len(list(each(*prepared(), METHODS["yaqa"](), 0.0))) == 14


def test_a_share_of_the_prefix_error_is_in_the_target_or_in_the_cross_moment():
    gm, ctx, linears = prepared()
    inputs = next(iter(prefix.Prefix(gm, ctx, linears, exact=True).inputs("test")))
    W = evidence._weight(gm, inputs.layers[0])
    _, known, target = next(each(gm, ctx, linears, METHODS["qronos"](), 0.25))
    torch.testing.assert_close(known.cross, 0.75 * inputs.gram + 0.25 * inputs.cross)
    assert torch.equal(target, W)
    _, known, target = next(each(gm, ctx, linears, METHODS["gptq"](), 0.25))
    assert torch.equal(target, propagate_error(W, inputs.gram, inputs.cross, 0.25, evidence.PROPAGATION_DAMPING))


def test_grams_of_groups_weigh_the_tokens_of_the_prefix():
    gm, ctx, linears = prepared()
    weights = {node: [torch.ones(4 * 24, 2) * torch.tensor([1.0, 3.0])] * 2 for node in linears}
    for inputs in prefix.Prefix(gm, ctx, linears, weights=weights).inputs("test"):
        for layer in inputs.layers:
            torch.testing.assert_close(inputs.grams[layer.node], torch.stack([inputs.gram, 3 * inputs.gram]))
