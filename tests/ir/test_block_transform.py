import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.block_transform import apply, balanced, in_order, moments
from ir.errors import DataError

N = 12


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed=0, out=20):
    """Tokens and a weight with correlated channels."""
    return normal(40, N, seed=seed) @ normal(N, N, seed=seed + 1), normal(out, N, seed=seed + 2) @ normal(N, N, seed=seed + 3)


def grams(b, *sides):
    """The diagonal blocks of both sides' Gram matrices."""
    return [moments(side, in_order(N, b)) for side in sides]


@given(st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 6, 12]))
@settings(max_examples=30, deadline=None)
def test_the_function_stays_and_both_grams_become_equal_and_diagonal(seed, b):
    X, W = layer(seed)
    T = balanced(*grams(b, X, W), damping=0.0)
    X_hat, W_hat = apply(T, X), apply(torch.linalg.inv(T).mT, W)
    torch.testing.assert_close(X_hat @ W_hat.T, X @ W.T, rtol=1e-9, atol=1e-9)
    after, of_weight = grams(b, X_hat, W_hat)
    torch.testing.assert_close(after, of_weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(after, torch.diag_embed(after.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-6 * float(after.max()))


def test_the_whole_width_reaches_the_nuclear_norm():
    X, W = layer()
    T = balanced(*grams(N, X, W), damping=0.0)
    reached = apply(T, X).norm() * apply(torch.linalg.inv(T).mT, W).norm()
    torch.testing.assert_close(reached, torch.linalg.matrix_norm(W @ X.T, "nuc"))


def test_blocks_of_one_are_scales():
    X, W = layer()
    s = (X.norm(dim=0) / W.norm(dim=0)).sqrt()
    torch.testing.assert_close(balanced(*grams(1, X, W), damping=0.0).flatten(), 1 / s)


def test_no_scaling_beforehand_changes_the_result():
    X, W = layer()
    s = normal(N, seed=9).exp()
    T, U = (balanced(*grams(4, A, B), damping=0.0) for A, B in ((X, W), (X / s, W * s)))
    torch.testing.assert_close(apply(T, X).abs(), apply(U, X / s).abs(), rtol=1e-7, atol=1e-7)


def test_grams_without_full_rank_need_damping():
    X, W = layer(out=2)
    X[:, 5] = 0
    with pytest.raises(DataError, match="full rank"):
        balanced(*grams(N, X, W), damping=0.0)
    T = balanced(*grams(N, X, W))
    torch.testing.assert_close(apply(T, X) @ apply(torch.linalg.inv(T).mT, W).T, X @ W.T, rtol=1e-9, atol=1e-9)
    nothing = torch.zeros(3, 4, 4)
    assert torch.isfinite(balanced(nothing, nothing)).all()


def test_moments_are_the_blocks_of_the_gram():
    X, _ = layer()
    channels = torch.randperm(N, generator=torch.Generator().manual_seed(0)).reshape(-1, 4)
    whole = X.T @ X
    torch.testing.assert_close(moments(X, channels), torch.stack([whole[at][:, at] for at in channels]))


def test_bad_grams_are_refused():
    good = torch.eye(4).expand(3, 4, 4)
    for bad in (good[:2], torch.ones(3, 4, 3), good * torch.nan):
        with pytest.raises(DataError):
            balanced(bad, good)
