import pytest
import torch

from ir import edit, numerics
from ir.cache import cache_sites
from ir.cache_code import CacheCode, compute, recode
from ir.canonical import canonicalize
from ir.encoding import Encoding
from ir.numerics import QParams
from ir.verify import verify

TEXTS = ["i8[1,-1]dynamic", "u8[1,-1]dynamic", "u4[1,-1]dynamic", "i2[1,-1]dynamic", "u3[1,4]dynamic", "f8e4m3[1,-1]dynamic"]


def keys(tokens=5):
    return torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_what_a_round_trip_through_the_encoding_gives(text):
    encoding, x = Encoding.parse(text), keys()
    code = CacheCode(encoding)
    qparams = numerics.choose_qparams(x, encoding, torch.float16)
    assert torch.equal(code.decode(code.encode(x, compute), torch.float32, compute), numerics.fake_quantize(x, encoding, qparams))


@pytest.mark.parametrize(("text", "shape"), [("u4[-1,1,-1,-1]", (1, 3, 1, 1)), ("i4[-1,1,-1,1]", (1, 3, 1, 16))])
def test_static_scales_take_no_place(text, shape):
    encoding, x = Encoding.parse(text), keys()
    zero_point = None if encoding.symmetric else torch.full(shape, 7, dtype=torch.uint8)
    code = CacheCode(encoding, torch.rand(shape) + 0.1, zero_point)
    kept = code.encode(x, compute)
    assert {suffix: part.shape for suffix, part in kept.items()} == {"": (2, 3, 5, 8)}
    expected = numerics.fake_quantize(x, encoding, QParams(code.scale, zero_point))
    assert torch.equal(code.decode(kept, torch.float32, compute), expected)


@pytest.mark.parametrize("text", TEXTS)
def test_no_tokens_are_no_codes(text):
    code = CacheCode(Encoding.parse(text))
    kept = code.encode(keys(0), compute)
    assert all(part.shape[2] == 0 for part in kept.values())
    assert code.decode(kept, torch.float32, compute).shape == (2, 3, 0, 16)


@pytest.mark.parametrize("value", [0.0, 1e-7, 3e4])
def test_scales_stay_finite_in_half_precision(value):
    code = CacheCode(Encoding.parse("u4[1,-1]dynamic"))
    x = torch.full((1, 1, 2, 16), value)
    found = code.decode(code.encode(x, compute), torch.float32, compute)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_floats_are_kept_as_bytes():
    assert CacheCode(Encoding.parse("f8e4m3[-1]"), torch.ones(1, 1, 1, 1)).encode(keys(), compute)[""].dtype == torch.uint8


def test_a_wide_code_can_fill_a_byte():
    code = CacheCode(Encoding.parse("u4[1,-1]dynamic"), packed=False)
    assert code.encode(keys(), compute)[""].shape == (2, 3, 5, 16)


def test_signature_example_and_graph_change_together(families):
    gm = families("llama").graph()
    canonicalize(gm)
    before = list(gm.meta["example"])
    plan = [(site, CacheCode(Encoding.parse("u4[1,-1]dynamic"))) for name, site in cache_sites(gm) if name != "1.value"]
    convert = recode(gm, plan)
    edit.clean(gm)
    verify(gm)
    signature = gm.meta["signature"]
    names = [port.name for port in signature.inputs if port.name.startswith("past")]
    parts = ("", "_scale", "_zero_point")
    coded = [f"past_key_values.{site.name}{part}" for site, _ in plan for part in parts]
    assert names == [*coded, "past_key_values.1.value"]
    assert [port.name.replace("present", "past_key_values") for port in signature.outputs[1:]] == names
    assert {port.dtype for port in signature.coded} == {"uint8", "float16"}
    assert all(torch.equal(a, b) for a, b in zip(convert(before), gm.meta["example"], strict=True))
    assert signature.bind(*gm.meta["example"][:1])
    outputs = gm(*gm.meta["example"])
    for port, output in zip(signature.outputs, outputs, strict=True):
        assert output.dtype == port.torch_dtype
        assert all(size in (None, given) for size, given in zip(port.shape, output.shape, strict=True))
