import torch

from ir.rounding import propagate_error
from tests.ir.rounding.samples import inputs, weight


def test_propagated_weights_make_up_for_the_error_of_the_inputs():
    W, X = weight(), inputs(tokens=400)
    X_hat = X + 0.3 * inputs(tokens=400, seed=5)
    H, cross = X_hat.T @ X_hat, X.T @ X_hat
    target = propagate_error(W, H, cross, damping=1e-6)
    exact = torch.linalg.lstsq(X_hat.double(), (X @ W.T).double()).solution.T
    torch.testing.assert_close(target.double(), exact, rtol=1e-2, atol=1e-3)
    assert torch.equal(propagate_error(W, H, H), W)
    assert torch.equal(propagate_error(W, H, cross, strength=0.0), W)
