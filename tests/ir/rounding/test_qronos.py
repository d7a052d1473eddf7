import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import GPTAQ, GPTQ, SCALE_DTYPE, Evidence, Nearest, Qronos
from tests.ir.rounding.samples import compressed, outputs_error, weight


def found(rounding, text):
    encoding, W, (X, X_hat) = Encoding.parse(text), weight(), compressed()
    return outputs_error(W, *rounding.round_weight(W, encoding, Evidence(gram=X_hat.T @ X_hat, cross=X.T @ X_hat)), encoding, X, X_hat)


@pytest.mark.parametrize("text", ["u2[1,16]", "u3[1,16]", "i4[1,-1]", "u4[4,16]"])
def test_it_comes_nearer_to_the_exact_outputs_than_gptq_and_gptaq(text):
    for sweeps in (0, 3):
        mine = found(Qronos(sweeps=sweeps), text)
        assert mine < found(Nearest(search=True), text)
        assert mine < 0.9 * found(GPTQ(sweeps=sweeps), text)
        assert mine < found(GPTAQ(sweeps=sweeps), text)


def test_it_is_the_published_iteration():
    """Each column to what is best with all others as they are; then least squares for those still free. In float64."""
    encoding, W, (X, X_hat) = Encoding.parse("u3[1,-1]"), weight(), compressed()
    found, _ = Qronos(damping=0.0, search=False, sweeps=0).round_weight(W, encoding, Evidence(X_hat.T @ X_hat, X.T @ X_hat))
    X, X_hat, V, codes = X.double(), X_hat.double(), W.double().clone(), []
    target = X @ V.T
    # The parameters of the only group are chosen from the optimum without rounding.
    optimum = torch.linalg.lstsq(X_hat, target).solution.T.float()
    qparams = numerics.choose_qparams(optimum, encoding, SCALE_DTYPE)
    for j in range(40):
        rest = [k for k in range(40) if k != j]
        best = X_hat[:, j] @ (target - X_hat[:, rest] @ V[:, rest].T) / X_hat[:, j].square().sum()
        codes.append(numerics.quantize(best[:, None], qparams, encoding))
        V[:, j] = numerics.dequantize(codes[-1], qparams, encoding, torch.float64)[:, 0]
        if j < 39:
            V[:, j + 1 :] = torch.linalg.lstsq(X_hat[:, j + 1 :], target - X_hat[:, : j + 1] @ V[:, : j + 1].T).solution.T
    assert (found != torch.cat(codes, 1)).float().mean() < 0.01


def test_it_is_gptq_where_the_prefix_has_no_error():
    encoding, W, (X, _) = Encoding.parse("u3[1,16]"), weight(), compressed()
    H = X.T @ X
    codes, _ = Qronos(damping=0.01, search=False).round_weight(W, encoding, Evidence(gram=H, cross=H))
    expected, _ = GPTQ(damping=0.01, search=False).round_weight(W, encoding, Evidence(gram=H))
    assert (codes != expected).float().mean() < 0.005
