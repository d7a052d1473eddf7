import functools

import pytest
import scipy.linalg
import torch

from ir.errors import OptionError
from ir.hadamard import exists, factors, hadamard, largest_block, misfit, orders, random_hadamard, random_orthogonal, transform

UNREACHED = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}  # up to 300: Williamson and others
ORDERS = [n for n in range(1, 301) if exists(n)]


def test_orders_are_one_two_and_multiples_of_four():
    assert [n for n in range(1, 301) if n not in UNREACHED and (n < 3 or n % 4 == 0)] == ORDERS
    assert not any(exists(n) for n in (0, -4, 3, 6, 30))


@pytest.mark.parametrize("n", ORDERS)
def test_matrices_are_orthonormal_symmetric_and_have_two_values(n):
    H = hadamard(n)
    assert torch.equal(H, H.T)
    assert torch.allclose(H @ H, torch.eye(n, dtype=H.dtype), atol=1e-13, rtol=0)
    assert torch.allclose(H.abs(), torch.full_like(H, n**-0.5), atol=0, rtol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 256, 512])
def test_powers_of_two_are_sylvesters(n):
    signs = torch.from_numpy(scipy.linalg.hadamard(n))
    assert torch.equal(hadamard(n).sign().long(), signs)


@pytest.mark.parametrize("n", [28, 52, 100, 244, 344, 1252])
def test_fields_of_prime_powers_serve_as_well(n):
    """Fields of 27, 25, 49, 243, 343 and 625 elements; no prime gives these orders but 28."""
    H = hadamard(n)
    assert torch.allclose(H @ H, torch.eye(n, dtype=H.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [4, 28, 128, 144, 704, 1408, 2048, 11008 // 8])
def test_the_product_of_the_factors_is_the_matrix(n):
    assert torch.allclose(functools.reduce(torch.kron, factors(n)), hadamard(n), atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (1,)), (44, (44,)), (128, (128,)), (256, (16, 16)), (704, (44, 16)), (2048, (64, 32)), (8192, (128, 64)), (11008, (344, 32))],
)
def test_factors_are_balanced(n, expected):
    assert orders(n) == expected


@pytest.mark.parametrize(("n", "block"), [(1, 1), (7, 1), (92, 4), (96, 96), (172 * 2, 344), (150, 2), (1000, 1000), (1003, 1)])
def test_the_largest_block_divides_and_exists(n, block):
    assert largest_block(n) == block
    assert exists(block) and n % block == 0


def test_what_cannot_be_made_is_refused_with_the_block_that_can():
    with pytest.raises(OptionError, match=r"order 92.*\n.*blocks of 4"):
        hadamard(92)
    for n in (0, -8):
        with pytest.raises(OptionError, match="positive"):
            hadamard(n)
    with pytest.raises(OptionError, match="not 0"):
        largest_block(0)
    with pytest.raises(OptionError, match="30 does not divide 100; the nearest block for 100 channels is 20"):
        transform(torch.zeros(2, 100), 30)
    with pytest.raises(OptionError, match="order 92 can be made; the nearest block for 368 channels is 16"):
        transform(torch.zeros(2, 368), 92)
    assert misfit(96, 0).startswith("0 does not divide 96")
    assert not misfit(96, 48)


@pytest.mark.parametrize(("channels", "block"), [(8, 8), (12, 4), (704, 704), (704, 44), (288, 144), (512, 256), (6, 1)])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (0, 3)])
def test_the_transform_is_a_block_diagonal_matrix(channels, block, leading):
    x = torch.randn(*leading, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.kron(torch.eye(channels // block, dtype=torch.float64), hadamard(block))
    y = transform(x, block)
    assert y.dtype == x.dtype
    assert torch.allclose(y, x @ H.T, atol=1e-12)
    assert torch.allclose(transform(y, block), x, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_tensors_are_transformed_in_float32_and_keep_their_dtype(dtype, tolerance):
    x = (torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    exact = transform(x.double(), 256)
    y = transform(x, 256)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() < tolerance * exact.norm()
    assert torch.equal(y, transform(x.float(), 256).to(dtype))


def test_the_order_of_use_does_not_matter_to_gradients():
    with torch.inference_mode():
        transform(torch.randn(2, 24), 24)
    x = torch.randn(2, 24, requires_grad=True)
    transform(x, 24).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x, atol=1e-5)


@pytest.mark.parametrize("make", [random_orthogonal, random_hadamard])
def test_random_matrices_are_orthogonal_and_follow_the_seed(make):
    Q = make(44, 3)
    assert Q.dtype == torch.float64
    assert torch.allclose(Q @ Q.T, torch.eye(44, dtype=torch.float64), atol=1e-13)
    assert torch.equal(Q, make(44, 3))
    assert not torch.equal(Q, make(44, 4))


def test_a_random_hadamard_matrix_has_flipped_columns():
    ratio = random_hadamard(28, 0) / hadamard(28)
    assert torch.equal(ratio.abs(), torch.ones_like(ratio))
    assert torch.equal(ratio, ratio[:1].expand_as(ratio))
    assert len(ratio[0].unique()) == 2


def test_random_orthogonal_matrices_have_no_preferred_sign():
    diagonal = torch.stack([random_orthogonal(4, seed).diagonal() for seed in range(400)])
    assert diagonal.mean().abs() < 0.1
    assert torch.allclose(diagonal.square().mean(), torch.tensor(0.25, dtype=torch.float64), atol=0.05)
