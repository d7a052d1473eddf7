import pytest
import torch

from backends.triton_gpu.ops.static import quantize_static
from ir import numerics
from ir.encoding import Encoding


@pytest.mark.parametrize("text", ["i8[-1]", "u8[-1]", "u4[-1]", "i2[-1]"])
def test_codes_of_static_scales_are_those_of_the_encoding_moved_to_int8(text: str) -> None:
    x, encoding = torch.randn(2, 3, 64, dtype=torch.float16), Encoding.parse(text)
    qparams = numerics.choose_qparams(torch.randn(1, 1, 4), encoding)
    shift = 0 if encoding.symmetric else 2 ** (encoding.bits - 1)
    zero = None if qparams.zero_point is None else (qparams.zero_point.to(torch.int16) - shift).to(torch.int8)
    codes = quantize_static(x, qparams.scale, zero, encoding.bits)
    assert torch.equal(codes.to(torch.int16), numerics.quantize(x, qparams, encoding).to(torch.int16) - shift)
    torch.library.opcheck(quantize_static, (x, qparams.scale, zero, encoding.bits))
