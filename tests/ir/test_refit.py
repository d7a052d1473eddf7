import pytest
import torch

from ir.refit import refit

GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(12, 12, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(400, 12, generator=GENERATOR, dtype=torch.float64) @ MIX + 1
W = torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
KEEP = torch.arange(12) % 3 > 0
GRAM, MEAN = X.T @ X / len(X), X.mean(0)


def test_it_is_the_least_squares_solution():
    fitted, bias = refit(W, GRAM, KEEP, 0.0)
    expected = torch.linalg.lstsq(X[:, KEEP], X @ W.T).solution.T
    assert bias is None
    assert torch.allclose(fitted[:, KEEP], expected)
    assert not fitted[:, ~KEEP].any()


def test_with_a_mean_it_is_the_solution_with_a_constant():
    fitted, bias = refit(W, GRAM, KEEP, 0.0, MEAN)
    expected = torch.linalg.lstsq(torch.cat([X[:, KEEP], torch.ones(len(X), 1)], 1), X @ W.T).solution.T
    assert torch.allclose(fitted[:, KEEP], expected[:, :-1])
    assert torch.allclose(bias, expected[:, -1])


@pytest.mark.parametrize("mean", [None, MEAN])
def test_damping_pulls_towards_the_weight_as_it_was(mean):
    moved = [float((refit(W, GRAM, KEEP, damping, mean)[0] - W)[:, KEEP].norm()) for damping in (0.0, 0.1, 10.0)]
    assert moved[0] > moved[1] > moved[2] > 0


def test_nothing_dropped_is_the_identity():
    fitted, bias = refit(W, GRAM, torch.ones(12, dtype=torch.bool), 0.01, MEAN)
    assert torch.equal(fitted, W)
    assert not bias.any()


def test_inputs_that_are_always_zero_do_no_harm():
    gram = GRAM.clone()
    gram[:, 1] = gram[1] = 0
    fitted, _ = refit(W.float(), gram, KEEP, 0.0)
    assert fitted.dtype == torch.float32
    assert torch.isfinite(fitted).all()
