import pytest
import torch

from ir.encoding import Encoding
from ir.rounding import Nearest
from ir.sites import layers
from passes.data.still import still_inputs
from passes.pruning.fit import Fit, squares
from tests.families import load
from tests.passes.samples import CALIBRATION, context, run


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without a bias, and with one
def test_errors_are_those_of_the_outputs(family):
    gm = load(family).graph()
    run(gm, "canonicalize")
    ctx = context(gm, CALIBRATION)
    layer = next(layer for layer in layers(gm) if layer.path.endswith(("down_proj", "mlp.c_proj")))
    (inputs,) = still_inputs(gm, ctx, {layer.node: layer}, "test")
    kept = torch.arange(len(inputs.gram)) % 3 > 0
    fit = Fit.of(gm, layer, inputs, kept, damping=0.01)
    assert fit.fitted.shape[1] == kept.sum() and (fit.bias is not None) == (family == "gpt2")
    dropped = fit.errors()
    only = squares(fit.W * ~kept, inputs.gram)  # with what goes made zero, and nothing refitted
    assert (dropped >= 0).all() and dropped.sum() < only.sum()
    rounded = fit.rounded(Nearest(), Encoding.parse("u8[1,-1]"))
    assert not rounded[:, ~kept].any()
    assert torch.allclose(fit.errors(rounded).sum(), dropped.sum(), rtol=0.15)
    assert fit.errors(fit.rounded(Nearest(), Encoding.parse("u2[1,-1]"))).sum() > 1.5 * dropped.sum()


def test_nothing_dropped_leaves_the_weight():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    layer = layers(gm)[1]
    (inputs,) = still_inputs(gm, context(gm, CALIBRATION), {layer.node: layer}, "test")
    fit = Fit.of(gm, layer, inputs, None, damping=0.01)
    assert fit.fitted is fit.W and not fit.errors().any()
