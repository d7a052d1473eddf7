import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir import numerics
from ir.encoding import Encoding
from ir.numerics import QParams

INTEGERS = [f"{letter}{bits}" for bits in range(2, 9) for letter in "iu"]


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("block", ["-1", "1,-1", "1,16", "2,5"])
def test_the_error_is_at_most_half_a_step_inside_the_range(name, block):
    x, encoding = random(6, 40), Encoding.parse(f"{name}[{block}]")
    qparams = numerics.choose_qparams(x, encoding)
    error = (numerics.fake_quantize(x, encoding, qparams) - x).abs()
    step = numerics.expand(qparams.scale, encoding, (6, 40))
    # A symmetric range has one code more below than above: the greatest positive value is clipped by half a step more.
    assert (error <= step * (1.0 if encoding.symmetric else 0.5) + 1e-6).all()
    inside = x < numerics.expand(qparams.scale, encoding, (6, 40)) * numerics.code_range(encoding)[1]
    assert not encoding.symmetric or (error <= step * 0.5 + 1e-6)[inside].all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_tensor_agrees_with_torch(bits):
    x, encoding = random(9, 9), Encoding.parse(f"u{bits}[-1]")
    qparams = numerics.choose_qparams(x, encoding)
    expected = torch.fake_quantize_per_tensor_affine(x, float(qparams.scale), int(qparams.zero_point), 0, 2**bits - 1)
    # torch multiplies by 1/s, we divide by s: a value on the border of two codes may fall on either side.
    off_the_border = ((x / qparams.scale).remainder(1) - 0.5).abs() > 1e-4
    torch.testing.assert_close(numerics.fake_quantize(x, encoding, qparams)[off_the_border], expected[off_the_border])


@pytest.mark.parametrize("bits", [3, 8])
def test_per_channel_agrees_with_torch(bits):
    x, encoding = random(5, 30), Encoding.parse(f"i{bits}[1,-1]")
    qparams = numerics.choose_qparams(x, encoding)
    low, high = numerics.code_range(encoding)
    expected = torch.fake_quantize_per_channel_affine(x, qparams.scale[:, 0], torch.zeros(5, dtype=torch.int32), 0, low, high)
    off_the_border = ((x / qparams.scale).remainder(1) - 0.5).abs() > 1e-4
    torch.testing.assert_close(numerics.fake_quantize(x, encoding, qparams)[off_the_border], expected[off_the_border])


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    x = random(3, 20)
    torch.testing.assert_close(numerics.fake_quantize(x, Encoding.parse("i1[1,-1]")), x.sign() * x.abs().mean(1, keepdim=True))


@pytest.mark.parametrize(("name", "mantissa"), [("f8e4m3", 3), ("f8e5m2", 2)])
def test_floats_round_to_their_mantissa(name, mantissa):
    x = random(4, 64)
    rounded = numerics.fake_quantize(x, Encoding.parse(f"{name}[1,-1]"))
    normal = x.abs() > x.abs().amax(1, keepdim=True) * 2.0**-6
    assert ((rounded - x).abs() <= x.abs() * 2.0 ** -(mantissa + 1) + 1e-7)[normal].all()


@pytest.mark.parametrize("name", ["i1", *INTEGERS, "f8e4m3"])
def test_a_ragged_last_group_is_its_own_block(name):
    x, encoding = random(3, 37), Encoding.parse(f"{name}[1,16]")
    parts = [numerics.fake_quantize(x[:, i : i + 16], Encoding.parse(f"{name}[1,-1]")) for i in (0, 16, 32)]
    torch.testing.assert_close(numerics.fake_quantize(x, encoding), torch.cat(parts, 1))


@pytest.mark.parametrize("text", ["i8[1,-1]", "u4[1,8]", "i1[-1]", "f8e5m2[-1]"])
@pytest.mark.parametrize("scale_dtype", [None, torch.float16])
def test_blocks_of_zeros_stay_zero_and_finite(text, scale_dtype):
    encoding, x = Encoding.parse(text), torch.zeros(4, 16)
    qparams = numerics.choose_qparams(x, encoding, scale_dtype)
    assert (qparams.scale > 0).all()
    assert numerics.fake_quantize(x, encoding, qparams).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    assert numerics.fake_quantize(random(4, 16).to(dtype), Encoding.parse("i8[1,-1]")).dtype == dtype


def test_a_second_round_trip_changes_nothing():
    x, encoding = random(4, 32), Encoding.parse("u4[1,8]")
    qparams = numerics.choose_qparams(x, encoding)
    once = numerics.fake_quantize(x, encoding, qparams)
    assert torch.equal(numerics.fake_quantize(once, encoding, qparams), once)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["i1", *INTEGERS]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_unpacking_is_the_inverse_of_packing(name, rows, size, seed):
    encoding = Encoding.parse(f"{name}[-1]")
    low, high = numerics.code_range(encoding)
    codes = torch.randint(low, high + 1, (rows, size), generator=torch.Generator().manual_seed(seed)).to(numerics.storage_dtype(encoding))
    codes = torch.where(codes == 0, 1, codes).to(codes.dtype) if encoding.bits == 1 else codes
    packed = numerics.pack(codes, encoding)
    assert packed.shape == (rows, -(-size * encoding.bits // 8))
    assert torch.equal(numerics.unpack(packed, encoding, size), codes)


def test_dequantize_is_the_affine_map():
    codes = torch.tensor([[0, 7, 15]], dtype=torch.uint8)
    values = numerics.dequantize(codes, QParams(torch.tensor([[0.5]]), torch.tensor([[7]], dtype=torch.uint8)), Encoding.parse("u4[1,-1]"))
    assert values.tolist() == [[-3.5, 0.0, 4.0]]


@pytest.mark.parametrize("text", ["i4[1,-1]dynamic*0.75", "u4[1,-1]dynamic*0.75"])
def test_a_clip_brings_the_scales_nearer_to_zero(text):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    clipped, whole = (numerics.choose_qparams(x, Encoding.parse(form)) for form in (text, text.removesuffix("*0.75")))
    assert torch.allclose(clipped.scale, 0.75 * whole.scale)
    assert numerics.fake_quantize(x, Encoding.parse(text)).abs().amax() < x.abs().amax()
