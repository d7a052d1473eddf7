import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.block_transform import apply, balanced, grouping, inverse, stages
from ir.errors import DataError, OptionError

N = 12


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed=0, out=20):
    """Tokens and a weight with correlated channels."""
    return normal(40, N, seed=seed) @ normal(N, N, seed=seed + 1), normal(out, N, seed=seed + 2) @ normal(N, N, seed=seed + 3)


def diagonal_blocks(gram, b):
    return torch.stack([gram[i : i + b, i : i + b] for i in range(0, len(gram), b)])


@given(st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=30, deadline=None)
def test_the_function_stays_and_both_grams_become_equal_and_diagonal(seed, b):
    X, W = layer(seed)
    T = balanced(X.T @ X, W.T @ W, b, damping=0.0)
    X_hat, W_hat = apply(T, X), apply(inverse(T).mT, W)
    torch.testing.assert_close(X_hat @ W_hat.T, X @ W.T, rtol=1e-9, atol=1e-9)
    after = diagonal_blocks(X_hat.T @ X_hat, b)
    torch.testing.assert_close(after, diagonal_blocks(W_hat.T @ W_hat, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after, torch.diag_embed(after.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-6 * float(after.max()))


def test_the_whole_width_reaches_the_nuclear_norm():
    X, W = layer()
    T = balanced(X.T @ X, W.T @ W, N, damping=0.0)
    reached = apply(T, X).norm() * apply(inverse(T).mT, W).norm()
    torch.testing.assert_close(reached, torch.linalg.matrix_norm(W @ X.T, "nuc"))


def test_blocks_of_one_are_scales():
    X, W = layer()
    s = (X.norm(dim=0) / W.norm(dim=0)).sqrt()
    torch.testing.assert_close(balanced(X.T @ X, W.T @ W, 1, damping=0.0).flatten(), 1 / s)


def test_no_scaling_beforehand_changes_the_result():
    X, W = layer()
    s = normal(N, seed=9).exp()
    T, U = (balanced(A.T @ A, B.T @ B, 4, damping=0.0) for A, B in ((X, W), (X / s, W * s)))
    torch.testing.assert_close(apply(T, X).abs(), apply(U, X / s).abs(), rtol=1e-7, atol=1e-7)


def test_grams_without_full_rank_need_damping():
    X, W = layer(out=2)
    X[:, 5] = 0
    with pytest.raises(DataError, match="full rank"):
        balanced(X.T @ X, W.T @ W, N, damping=0.0)
    T = balanced(X.T @ X, W.T @ W, N)
    torch.testing.assert_close(apply(T, X) @ apply(inverse(T).mT, W).T, X @ W.T, rtol=1e-9, atol=1e-9)
    nothing = torch.zeros(N, N)
    assert torch.isfinite(balanced(nothing, nothing, 4)).all()


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
        balanced(good, good, 5)
    for bad in (torch.ones(N, N - 1), good * torch.nan):
        with pytest.raises(DataError):
            balanced(bad, good, 4)
