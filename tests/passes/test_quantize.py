import pytest
import torch

from ir import edit, numerics
from ir.capture import capture
from ir.encoding import Encoding
from ir.errors import DataError
from ir.match import find
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from ir.text import graph_text
from tests.families import LAYERS, load
from tests.passes.samples import CALIBRATION, Mlp, run, vectors

DYNAMIC = Encoding.parse("i8[1,-1]dynamic")


def quantized(pipeline, calibration=None):
    model = Mlp()
    gm = capture(model, args=(vectors(),))
    records, ctx = run(gm, pipeline, calibration)
    return model, gm, records, ctx


def fake_weight(linear, encoding="i8[1,-1]"):
    parsed = Encoding.parse(encoding)
    return numerics.fake_quantize(linear.weight.detach(), parsed, numerics.choose_qparams(linear.weight.detach(), parsed, torch.float16))


def expected(model, x, fake_input):
    """The Mlp with fake quantized weights and inputs, straightforwardly."""
    hidden = torch.relu(torch.nn.functional.linear(fake_input(x, 0), fake_weight(model.up), model.up.bias))
    return torch.nn.functional.linear(fake_input(hidden, 1), fake_weight(model.down))


def test_dynamic_activations_have_a_scale_per_token():
    model, gm, records, _ = quantized("annotate, quantize")
    assert records[-1].sites == 4
    found = gm(vectors(3))[0]
    torch.testing.assert_close(found, expected(model, vectors(3), lambda x, _: numerics.fake_quantize(x, DYNAMIC)))


def test_static_activations_have_the_range_that_was_observed():
    model, gm, _, _ = quantized("annotate(dynamic=False), observe, quantize", [vectors(1), vectors(2)])
    seen = torch.cat([vectors(1), vectors(2)])
    hidden = torch.relu(model.up(seen))
    encoding = Encoding.parse("u8[-1]")
    ranges = [numerics.choose_qparams(x.detach(), encoding) for x in (seen, hidden)]
    found = gm(vectors(3))[0]
    torch.testing.assert_close(found, expected(model, vectors(3), lambda x, i: numerics.fake_quantize(x, encoding, ranges[i])))
    assert not find(gm, CHOOSE_QPARAMS)


def test_a_quantile_clips_the_static_range():
    def scales(quantile):
        _, gm, _, _ = quantized(f"annotate(dynamic=False), observe, quantize(quantile={quantile})", [vectors(1, 64)])
        return [float(edit.attribute(gm, node.args[1])) for node in find(gm, QUANTIZE)]

    whole, clipped = scales(1.0), scales(0.9)
    limit = float(vectors(1, 64).abs().quantile(0.9))
    assert all(a < 0.8 * b for a, b in zip(clipped, whole, strict=True))
    assert clipped[0] == pytest.approx(2 * limit / 255, rel=0.05)


def test_readers_of_one_tensor_share_its_operators():
    gm = load("llama").graph()
    run(gm, "canonicalize, annotate, quantize")
    assert len(find(gm, QUANTIZE)) == 4 * LAYERS
    shared = [node for node in find(gm, DEQUANTIZE) if len(node.users) > 1]
    assert sorted(len(node.users) for node in shared) == sorted([3, 2] * LAYERS)


@pytest.mark.parametrize("options", ["", "(dynamic=False)"])
def test_a_second_run_changes_nothing(options):
    _, gm, _, ctx = quantized(f"annotate{options}, observe, quantize", [vectors(1)])
    text = graph_text(gm)
    (again,), _ = run(gm, "quantize", ctx=ctx)
    assert again.sites == 0
    assert graph_text(gm) == text


def test_weights_that_are_rounded_already_are_kept():
    _, gm, records, _ = quantized("annotate, round_weights(method='nearest'), quantize")
    assert [record.sites for record in records] == [2, 2, 2]
    _, once, _, _ = quantized("annotate, quantize")
    assert torch.equal(gm(vectors(3))[0], once(vectors(3))[0])


def test_static_activations_need_statistics_of_this_graph():
    for pipeline in ("annotate(dynamic=False), quantize", "observe, annotate(dynamic=False), round_weights(method='nearest'), quantize"):
        with pytest.raises(DataError, match="need statistics"):
            quantized(pipeline, [vectors(1)])


def test_two_encodings_of_one_tensor_have_operators_of_their_own():
    gm = load("llama").graph()
    run(gm, "canonicalize, annotate, annotate(scheme='W4A4', targets=('q_proj',)), quantize", CALIBRATION)
    assert len(find(gm, QUANTIZE)) == 5 * LAYERS
