import pytest
import torch

from ir import edit, evaluate, numerics
from ir.encoding import Encoding
from ir.sites import layers
from passes.data.prefix import Prefix
from passes.data.still import still_inputs
from tests.families import load
from tests.passes.samples import CALIBRATION, run


def prepared(pipeline):
    gm = load("llama").graph()
    _, ctx = run(gm, f"canonicalize, untie, {pipeline}", CALIBRATION)
    return gm, ctx, {layer.node: layer for layer in layers(gm) if layer.path.endswith("_proj")}


def tapped(gm, ctx, node):
    found = []
    for batch in ctx.calibration:
        evaluate.run(gm, batch, lambda at, value: found.append(value) if at is node else None)
    return torch.cat([value.flatten(0, -2) for value in found]).double()


@pytest.mark.parametrize(
    "inputs_of", [lambda gm, ctx, pending: Prefix(gm, ctx, pending).inputs("test"), lambda *given: still_inputs(*given, "test")]
)
def test_every_layer_gets_the_second_moments_of_its_input(inputs_of):
    gm, ctx, pending = prepared("annotate")
    seen = []
    for inputs in inputs_of(gm, ctx, pending):
        x = tapped(gm, ctx, inputs.layers[0].site("input").operand)
        torch.testing.assert_close(inputs.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        assert inputs.cross is None
        seen += [layer.path.rpartition(".")[2] for layer in inputs.layers]
    assert seen == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2


def test_what_rounding_leaves_of_inputs_has_second_moments():
    gm, ctx, pending = prepared("annotate")
    encodings = [Encoding.parse(text) for text in ("i4[1,-1]dynamic*0.8", "i8[1,-1]dynamic")]
    (source,) = {layer.site("input").operand for layer in pending.values() if layer.path.endswith(("0.mlp.up_proj", "0.mlp.gate_proj"))}
    noise = {inputs.layers[0].path: inputs.noise for inputs in still_inputs(gm, ctx, pending, "test", {source: encodings})}
    assert [path for path, found in noise.items() if found] == ["model.layers.0.mlp.gate_proj"]
    x = tapped(gm, ctx, source)
    for encoding in encodings:
        errors = x - numerics.fake_quantize(x.float(), encoding).double()
        found = noise["model.layers.0.mlp.gate_proj"][encoding]
        torch.testing.assert_close(found.double(), errors.T @ errors / len(x), rtol=1e-3, atol=1e-7)


def test_the_model_as_it_was_has_no_rounded_activations():
    gm, ctx, pending = prepared("annotate(scheme='W4A4'), quantize(weights=False)")
    exact = load("llama").graph()
    run(exact, "canonicalize")
    wanted = {layer.path: layer for layer in layers(exact)}
    for inputs in Prefix(gm, ctx, pending, exact=True).inputs("test"):
        x_hat = tapped(gm, ctx, inputs.layers[0].site("input").operand)
        x = tapped(exact, ctx, wanted[inputs.layers[0].path].site("input").operand)
        torch.testing.assert_close(inputs.gram.double(), x_hat.T @ x_hat / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.mean.double(), x_hat.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inputs.cross.double(), x.T @ x_hat / len(x), rtol=1e-4, atol=1e-4)


def test_tensors_of_the_model_as_it_was_are_released_block_by_block():
    gm, ctx, pending = prepared("annotate(scheme='W4A4'), quantize(weights=False)")
    prefix, held = Prefix(gm, ctx, pending, exact=True), []
    for _ in prefix.inputs("test"):
        held.append(sum(tensor.numel() for tensor in prefix.was.gm.state_dict().values()))
    assert held == sorted(held, reverse=True)
    of_linears = sum(edit.attribute(gm, layer.weight).numel() for layer in pending.values())
    assert held[0] - held[-1] > of_linears / 2


def test_making_up_for_the_prefix_helps():
    found = {}
    for strength in (0.0, 0.5):
        gm, ctx, _ = prepared("annotate(scheme='W2A16', group=32, symmetric=False)")
        (record,), _ = run(gm, f"round_weights(propagation={strength})", ctx=ctx)
        found[strength] = record.difference
    assert found[0.5] < found[0.0]
