import pytest
import torch

from backends.triton_gpu.kernels import rows
from backends.triton_gpu.ops.rows import norm_quantize_rows, quantize_rows
from ir.errors import OptionError

ENCODINGS = ("i8[1,-1]dynamic", "i4[1,-1]dynamic*0.8", "u8[1,-1]dynamic*0.9", "u3[1,-1]dynamic")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_scales_and_zero_points_are_those_of_the_eager_body(text: str, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 0.3, 1.0, 200.0])[:, None]
    x[0, 0], x[1, 1] = 0, x[1, 1].abs() + 1  # nothing at all, and nothing below zero
    x = x.to(dtype)
    for made, expected in zip(rows.quantize_rows(x.to(device), text), quantize_rows(x, text), strict=True):
        assert torch.equal(made.cpu(), expected)


@pytest.mark.parametrize("text", ENCODINGS[1:3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [True, False])
def test_normed_rows_have_the_codes_of_the_eager_body_up_to_the_last_bit_of_a_norm(
    text: str, dtype: torch.dtype, gain: bool, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 300, generator=g).to(dtype), (torch.rand(300, generator=g) + 0.5).to(dtype) if gain else None
    made = rows.norm_quantize_rows(x.to(device), None if weight is None else weight.to(device), 1e-5, text)
    codes, scale, zero = norm_quantize_rows(x, weight, 1e-5, text)
    # A sum in another order moves a norm by a bit of float32, and that, at an edge, the rounding of a value by one of its dtype.
    torch.testing.assert_close(made[1].cpu(), scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(made[2].cpu(), zero)
    apart = (made[0].cpu().int() - codes.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 0.01 * apart.numel()


@pytest.mark.parametrize("text", ["i1[1,-1]dynamic", "f8e4m3[1,-1]dynamic", "i8[1,64]dynamic", "i8[-1]dynamic"])
def test_what_has_no_kernel_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        rows.quantize_rows(torch.zeros(2, 64), text)


def test_float64_is_refused() -> None:
    with pytest.raises(OptionError, match="float64"):
        rows.quantize_rows(torch.zeros(2, 64, dtype=torch.float64), ENCODINGS[0])
