import pytest
import torch

from backends.triton_gpu import layout
from backends.triton_gpu.ops.linear import packed_linear, packed_linear_int8
from ir import numerics
from ir.encoding import Encoding


def _packed(text: str, container: int, n: int = 12, k: int = 200) -> tuple[torch.Tensor, dict[str, object]]:
    """A weight's values, and the operator's arguments that say the same."""
    encoding = Encoding.parse(text)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    qparams = numerics.choose_qparams(w, encoding)
    codes = numerics.quantize(w, qparams, encoding)
    bits, sign = encoding.bits, encoding.bits == 1
    unsigned = (codes + 1) // 2 if sign else codes.to(torch.int16) - numerics.code_range(encoding)[0]
    arguments = {
        "planes": layout.pack(unsigned.to(torch.uint8), bits, container),
        "scale": qparams.scale.T.contiguous() * (2 if sign else 1),
        "zero": None if qparams.zero_point is None else qparams.zero_point.T.contiguous(),
        "bias": torch.randn(n),
        "bits": bits,
        "group": encoding.block_shape((n, k))[1],
        "offset": 0.5 if sign else 2.0 ** (bits - 1),
    }
    return numerics.dequantize(codes, qparams, encoding), arguments


WEIGHTS = ("i1[1,64]", "i2[1,32]", "u3[1,64]", "i4[1,128]", "u4[1,-1]", "u5[1,64]", "i6[1,-1]", "i7[1,32]", "u8[1,64]")


@pytest.mark.parametrize("text", WEIGHTS)
def test_it_multiplies_by_the_weights_that_the_codes_stand_for(text: str) -> None:
    w, arguments = _packed(text, 16)
    x = torch.randn(2, 3, 200)
    torch.testing.assert_close(packed_linear(x, **arguments), torch.nn.functional.linear(x, w, arguments["bias"]))


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("given", ["i8[1,-1]dynamic", "i4[1,-1]dynamic", "u8[1,-1]dynamic", "i8[-1]"])
def test_integers_are_summed_exactly(text: str, given: str) -> None:
    w, arguments = _packed(text, 8)
    encoding, x = Encoding.parse(given), torch.randn(2, 3, 200)
    qparams = numerics.choose_qparams(x, encoding)
    codes, zero = numerics.quantize(x, qparams, encoding).to(torch.int16), qparams.zero_point
    if zero is not None:
        codes, zero = codes - 128, (zero.to(torch.int16) - 128).to(torch.int8)
    y = packed_linear_int8(codes.to(torch.int8), qparams.scale, zero, dtype=torch.float32, **arguments)
    exact = numerics.dequantize(numerics.quantize(x, qparams, encoding), qparams, encoding)
    torch.testing.assert_close(y, torch.nn.functional.linear(exact, w, arguments["bias"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["u3[1,64]", "i4[1,-1]"])
def test_they_are_operators_as_torch_wants_them(text: str) -> None:
    _, arguments = _packed(text, 16)
    torch.library.opcheck(packed_linear, (torch.randn(2, 200),), arguments)
    _, arguments = _packed(text, 8)
    given = torch.randint(-8, 8, (2, 200), dtype=torch.int8), torch.rand(2, 1), None
    torch.library.opcheck(packed_linear_int8, given, arguments | {"dtype": torch.float16})
