import pytest
import torch

from backends.sites import Weight
from backends.triton_gpu.ops.linear import weight_values
from backends.triton_gpu.weights import packed
from ir import numerics
from ir.encoding import Encoding

ENCODINGS = ("i1[1,64]", "u2[1,32]", "i3[1,-1]", "i4[1,128]", "u5[1,64]", "i8[-1]", "u4[8,64]", "i1[16,-1]")


@pytest.mark.parametrize("container", [8, 16])
@pytest.mark.parametrize("text", ENCODINGS)
def test_it_stands_for_the_values_of_the_codes(text: str, container: int) -> None:
    encoding = Encoding.parse(text)
    w = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    qparams = numerics.choose_qparams(w, encoding)
    codes = numerics.quantize(w, qparams, encoding)
    made = packed(Weight(codes, qparams.scale, qparams.zero_point, encoding), container)
    values = weight_values(made.planes, made.scale, made.zero, made.bits, made.group, made.offset, 200)
    assert torch.equal(values, numerics.dequantize(codes, qparams, encoding))
    assert made.scale.dtype == torch.float32 and made.scale.shape == (-(-200 // made.group), 20)
    per_scale = 4 if made.zero is None else 5
    assert made.nbytes == sum(plane.nbytes for plane in made.planes) + per_scale * made.scale.numel()


HALF, FULL = torch.float16, torch.float32


@pytest.mark.parametrize(("scale", "kept"), [(0.125, HALF), (1 / 3, FULL), (2.0**-30, FULL), (40000.0, HALF)])
def test_scales_are_narrowed_where_that_rounds_none(scale: float, kept: torch.dtype) -> None:
    codes = torch.ones(4, 64, dtype=torch.int8)
    made = packed(Weight(codes, torch.full((4, 1), scale), None, Encoding.parse("i4[1,-1]")), 16)
    assert made.scale.dtype == kept and torch.equal(made.scale.float(), torch.full((1, 4), scale))


def test_a_sign_whose_scale_doubles_beyond_float16_keeps_it() -> None:
    made = packed(Weight(torch.ones(4, 64, dtype=torch.int8), torch.full((4, 1), 40000.0), None, Encoding.parse("i1[1,-1]")), 16)
    assert made.offset == 0.5 and made.scale.dtype == torch.float32 and made.scale[0, 0] == 80000
