import pytest
import torch

from backends.triton_gpu.kernels import hadamard as kernels
from backends.triton_gpu.ops.rows import hadamard_quantize_rows
from ir import hadamard as matrices
from ir.errors import OptionError

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def _sample(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((3, 6), 2, HALF),
        ((2, 3, 96), 32, BRAIN),
        ((3, 64), 64, SINGLE),
        ((2, 384), 128, HALF),
        ((2, 3, 1024), 512, BRAIN),
        ((2, 4096), 4096, SINGLE),
        ((1, 8192), 8192, HALF),
        ((1, 32768), 32768, SINGLE),
    ],
)
def test_it_is_the_transform_of_the_eager_body(shape: tuple[int, ...], block: int, dtype: torch.dtype, device: torch.device) -> None:
    x = _sample(*shape, dtype=dtype)
    assert kernels.has_kernel(x, block)
    bits = 2.0**-18 if dtype == SINGLE else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(kernels.hadamard(x.to(device), block).cpu(), matrices.transform(x, block), rtol=bits, atol=bits)


def test_integers_are_transformed_exactly(device: torch.device) -> None:
    x = torch.randint(-8, 9, (3, 256), generator=torch.Generator().manual_seed(0)).to(HALF)
    assert torch.equal(kernels.hadamard(x.to(device), 256).cpu(), matrices.transform(x.double(), 256).to(HALF))


@pytest.mark.parametrize(
    ("shape", "block", "text", "dtype"),
    [
        ((2, 2, 96), 32, "i8[1,-1]dynamic", HALF),
        ((3, 1152), 128, "u8[1,-1]dynamic*0.9", BRAIN),
        ((2, 2048), 2048, "i4[1,-1]dynamic*0.8", SINGLE),
        ((1, 5120), 1024, "i8[1,-1]dynamic", BRAIN),
        ((1, 16384), 8192, "u4[1,-1]dynamic", HALF),
        ((2, 84), 84, "i8[1,-1]dynamic", SINGLE),
    ],
)
def test_codes_are_those_of_the_eager_body_but_at_edges(
    shape: tuple[int, ...], block: int, text: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = _sample(*shape, dtype=dtype)
    made = kernels.hadamard_quantize_rows(x.to(device), block, text)
    codes, scale, zero = hadamard_quantize_rows(x, block, text)
    # Sums in another order may move a value by a bit of its dtype, and with the extreme all of a row's codes near an edge.
    torch.testing.assert_close(made[1].cpu(), scale, rtol=2 * max(2.0**-20, torch.finfo(dtype).eps), atol=0)
    assert (made[2].cpu().int() - zero.int()).abs().max() <= 1
    apart = (made[0].cpu().int() - codes.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 0.01 * apart.numel()


def test_orders_without_a_kernel_take_the_products_of_the_eager_body(device: torch.device) -> None:
    x = _sample(2, 84, dtype=SINGLE)
    assert not kernels.has_kernel(x, 12)
    assert torch.equal(kernels.hadamard(x.to(device), 12).cpu(), matrices.transform(x, 12))


def test_blocks_that_do_not_divide_are_refused(device: torch.device) -> None:
    x = torch.zeros(2, 96, device=device)
    with pytest.raises(OptionError, match="does not divide"):
        kernels.hadamard(x, 64)
    with pytest.raises(OptionError, match="does not divide"):
        kernels.hadamard_quantize_rows(x, 64, "i8[1,-1]dynamic")
