import pytest
import torch

from ir.errors import DataError, OptionError
from tools.block_stages import diagonal_blocks, grouping, stages

N = 12


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed=0, out=20):
    """Tokens and a weight with correlated channels."""
    return normal(40, N, seed=seed) @ normal(N, N, seed=seed + 1), normal(out, N, seed=seed + 2) @ normal(N, N, seed=seed + 3)


@pytest.mark.parametrize("blocks", [(4,), (3, 4), (4, 4), (4, 3, 4)])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_stage_keeps_the_function_and_lowers_the_product_of_norms(blocks, grouped):
    X, W = layer()
    expected, products = X @ W.T, []
    products.append(float((X.norm(dim=0) * W.norm(dim=0)).sum()))  # what the best scales reach
    for stage in stages(X.T @ X, W.T @ W, blocks, grouped=grouped):
        X, W = stage.activation(X), stage.weight(W)
        products.append(float(X.norm() * W.norm()))
        assert sorted(stage.order.tolist()) == list(range(N))
    torch.testing.assert_close(X @ W.T, expected, rtol=1e-9, atol=1e-8)
    assert products == sorted(products, reverse=True) and products[-1] < products[0]


def test_a_stage_works_in_the_dtype_of_its_input():
    X, W = layer()
    (stage,) = stages(X.T @ X, W.T @ W, (4,))
    assert stage.activation(X.float()).dtype == torch.float32
    assert stage.activation(X.reshape(5, 8, N)).shape == (5, 8, N)


def test_channels_that_gain_from_each_other_share_a_block():
    X, W = normal(4000, N), torch.linalg.qr(normal(20, N, seed=1))[0]
    X[:, 7] = 3 * X[:, 2] + 0.1 * X[:, 7]  # correlated in X, not in W
    order = grouping(X.T @ X, W.T @ W, 2)
    assert sorted(order.tolist()) == list(range(N))
    assert {2, 7} in [set(pair) for pair in order.reshape(-1, 2).tolist()]


@pytest.mark.parametrize("b", [1, 5, 6, N])
def test_a_grouping_is_an_order_of_all_channels(b):
    gram = torch.eye(N)
    if N % b:
        with pytest.raises(OptionError, match="divide"):
            grouping(gram, gram, b)
    else:
        assert sorted(grouping(gram, gram, b).tolist()) == list(range(N))


def test_bad_grams_are_refused():
    good = torch.eye(N)
    with pytest.raises(OptionError, match="divide"):
        diagonal_blocks(good, 5)
    for bad in (torch.ones(N, N - 1), good * torch.nan):
        with pytest.raises(DataError):
            diagonal_blocks(bad, 4)
