import pytest
import torch

from backends.triton_gpu.ops.cache import dequantize_cache, quantize_cache
from ir import ops

ENCODINGS = ("u4[1,32]dynamic", "i4[1,-1]dynamic", "u2[1,16]dynamic", "i8[1,64]dynamic")


@pytest.mark.parametrize("text", ENCODINGS)
def test_it_is_what_the_operators_in_its_place_keep(text: str) -> None:
    x = torch.randn(2, 4, 7, 64, dtype=torch.float16)
    packed, scale, zero = quantize_cache(x, text)
    chosen, z = ops.choose_qparams(x, text)
    z = z if text.startswith("u") else None
    codes = ops.quantize(x, chosen, z, text)
    assert torch.equal(packed, ops.pack(codes, text)) and torch.equal(scale, chosen)
    assert torch.equal(dequantize_cache(packed, scale, zero, text, x.dtype), ops.dequantize(codes, chosen, z, text, x.dtype))


def test_they_are_operators_as_torch_wants_them() -> None:
    x = torch.randn(2, 4, 7, 64)
    torch.library.opcheck(quantize_cache, (x, ENCODINGS[0]))
    torch.library.opcheck(dequantize_cache, (*quantize_cache(x, ENCODINGS[2]), ENCODINGS[2], torch.float16))
