import torch

from ir.encoding import Encoding
from ir.rounding import GPTQ, Evidence, Nearest
from tests.ir.rounding.samples import error, inputs, weight


def test_damping_rises_until_a_singular_or_slightly_indefinite_matrix_can_be_factored():
    encoding, W, X = Encoding.parse("u4[1,16]"), weight(), inputs(tokens=5)
    H = X.T @ X
    assert error(GPTQ(damping=0), encoding, W, H) < error(Nearest(), encoding, W, H)
    H = H - 0.05 * H.diagonal().mean() * torch.eye(40)
    assert GPTQ().round_weight(W, encoding, Evidence(H))[0].shape == W.shape
