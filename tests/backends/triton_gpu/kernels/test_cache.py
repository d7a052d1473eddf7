import pytest
import torch

from backends.triton_gpu.kernels import cache
from backends.triton_gpu.ops.cache import dequantize_cache, quantize_cache
from ir.errors import OptionError

CASES = (
    ("u4[1,32]dynamic", 64, torch.float16, torch.float16),
    ("i4[1,-1]dynamic", 80, torch.bfloat16, None),
    ("u2[1,16]dynamic*0.9", 96, torch.float32, None),
    ("i8[1,64]dynamic", 72, torch.float16, torch.float32),  # the last block is ragged
    ("u3[1,-1]dynamic", 64, torch.bfloat16, torch.float16),
    ("i2[1,48]dynamic", 64, torch.float32, torch.float16),
    ("u8[1,24]dynamic", 24, torch.float16, None),
)


@pytest.mark.parametrize(("text", "width", "dtype", "kept"), CASES)
def test_bytes_and_values_are_those_of_the_eager_bodies(
    text: str, width: int, dtype: torch.dtype, kept: torch.dtype | None, device: torch.device
) -> None:
    x = torch.randn(2, 3, 23, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[1, 1, 5] = 0, x[1, 1, 5].abs() + 1
    made, expected = cache.quantize_cache(x.to(device), text, kept), quantize_cache(x, text, kept)
    for tensor, value in zip(made, expected, strict=True):
        assert torch.equal(tensor.cpu(), value)
    back = cache.dequantize_cache(made[0], made[1], made[2] if text[0] == "u" else None, text, dtype)
    assert torch.equal(back.cpu(), dequantize_cache(*expected, text, dtype))


@pytest.mark.parametrize(("text", "width", "dtype"), [("i8[-1]dynamic", 64, None), ("u4[1,-1]dynamic", 63, None), ("i4[1,-1]", 64, None)])
def test_what_has_no_kernel_is_refused(text: str, width: int, dtype: torch.dtype | None) -> None:
    with pytest.raises(OptionError):
        cache.quantize_cache(torch.zeros(2, width), text, dtype)


def test_scales_of_other_dtypes_are_refused() -> None:
    with pytest.raises(OptionError, match="bfloat16"):
        cache.quantize_cache(torch.zeros(2, 64), "u4[1,32]dynamic", torch.bfloat16)
