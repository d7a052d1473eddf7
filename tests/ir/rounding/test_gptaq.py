import pytest
import torch

from ir.encoding import Encoding
from ir.rounding import GPTAQ, GPTQ, Evidence, Nearest
from tests.ir.rounding.samples import compressed, outputs_error, weight

PLAIN = {"search": False, "sweeps": 0}


def found(rounding, text):
    """The error of the outputs, towards those of exact inputs."""
    encoding, W, (X, X_hat) = Encoding.parse(text), weight(), compressed()
    return outputs_error(W, *rounding.round_weight(W, encoding, Evidence(gram=X_hat.T @ X_hat, cross=X.T @ X_hat)), encoding, X, X_hat)


@pytest.mark.parametrize("text", ["u2[1,16]", "u3[1,16]", "i4[1,-1]", "u4[4,16]"])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_comes_nearer_to_the_exact_outputs_than_gptq(text, act_order):
    for options in ({"sweeps": 0}, {}):
        mine = found(GPTAQ(act_order=act_order, **options), text)
        assert mine < found(GPTQ(act_order=act_order, **options), text)
        assert mine < found(Nearest(search=True), text)
    assert mine < 0.9 * found(GPTQ(act_order=act_order), text)


def test_it_is_gptq_where_the_prefix_has_no_error():
    encoding, W, (X, _) = Encoding.parse("u3[1,16]"), weight(), compressed()
    H = X.T @ X
    for options in ({}, {"act_order": True}, PLAIN):
        codes, qparams = GPTAQ(**options).round_weight(W, encoding, Evidence(gram=H, cross=H))
        expected, parameters = GPTQ(**options).round_weight(W, encoding, Evidence(gram=H))
        assert torch.equal(codes, expected)
        assert torch.equal(qparams.scale, parameters.scale)


@pytest.mark.parametrize("block", [5, 16])
def test_the_extra_term_is_that_of_the_paper(block):
    """Its loop in float64, `w_F += w_j (δᵀX̂)_jF H_F⁻¹` over the free columns F, with many levels, so that hardly anything is rounded."""
    encoding, W, (X, X_hat) = Encoding.parse("i8[1,-1]"), weight(), compressed()
    gram, cross = X_hat.T @ X_hat, X.T @ X_hat
    H = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(40)
    V = W.double().clone()
    for j in range(39):
        free = slice(j + 1, 40)
        V[:, free] += V[:, j : j + 1] @ (cross - gram).double()[j : j + 1, free] @ torch.linalg.inv(H[free, free])
    codes, qparams = GPTAQ(block=block, **PLAIN).round_weight(W, encoding, Evidence(gram, cross))
    differences = codes * qparams.scale.double() - V
    plain, _ = GPTQ(**PLAIN).round_weight(W, encoding, Evidence(gram))
    assert differences.square().mean() < 0.05 * (plain * qparams.scale.double() - V).square().mean()
