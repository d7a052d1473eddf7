import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.straight_through import clip_shape, fake_quantize


def x(rows=6, columns=64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "text", ["i4[1,-1]dynamic", "u4[1,-1]dynamic", "i3[1,16]", "u2[1,16]", "i8[-1]", "i4[1,24]", "i4[1,-1]dynamic*0.8"]
)
def test_values_are_those_of_fake_quantization(text):
    encoding = Encoding.parse(text)
    torch.testing.assert_close(fake_quantize(x(), encoding, encoding.clip), numerics.fake_quantize(x(), encoding), rtol=1e-5, atol=1e-6)


def test_the_gradient_passes_rounding_and_stops_at_what_is_clipped():
    encoding, values = Encoding.parse("i4[-1]"), x().requires_grad_()
    fake_quantize(values, encoding, 0.5).sum().backward()
    limit = 0.5 * x().abs().amax()
    greatest = x().abs() == x().abs().amax()
    inside = (x().abs() < 0.9 * limit) & ~greatest
    outside = (x().abs() > 1.1 * limit) & ~greatest
    assert torch.equal(values.grad[inside], torch.ones_like(values.grad[inside]))
    assert torch.equal(values.grad[outside], torch.zeros_like(values.grad[outside]))


@pytest.mark.parametrize(("text", "shape"), [("i4[1,-1]", (6, 1, 1, 1)), ("i4[1,16]", (6, 1, 4, 1)), ("u4[1,24]", (6, 1, 3, 1))])
def test_there_is_a_clip_for_each_scale(text, shape):
    encoding = Encoding.parse(text)
    assert clip_shape((6, 64), encoding) == shape
    clip = torch.full(shape, 0.8).requires_grad_()
    fake_quantize(x(), encoding, clip).square().sum().backward()
    assert (clip.grad != 0).all()
