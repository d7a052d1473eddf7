import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import GPTQ, SCALE_DTYPE, Evidence, Nearest
from tests.ir.rounding.samples import ENCODINGS, FEW, error, gram, inputs, weight

PLAIN = GPTQ(search=False, sweeps=0)


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("rounding", [PLAIN, GPTQ(search=False, sweeps=0, act_order=True)])
def test_gptq_is_nearest_when_inputs_are_uncorrelated(text, rounding):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = rounding.round_weight(W, encoding, Evidence(torch.eye(40)))
    expected, parameters = Nearest().round_weight(W, encoding)
    assert torch.equal(codes, expected)
    assert torch.equal(qparams.scale, parameters.scale)


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_makes_a_smaller_output_error_than_nearest_and_descent_a_smaller_one_still(text, act_order):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    for search in {False, text in FEW}:
        plain = error(GPTQ(act_order=act_order, search=search, sweeps=0), encoding, W, H)
        assert plain < error(Nearest(search=search), encoding, W, H)
        assert error(GPTQ(act_order=act_order, search=search), encoding, W, H) < plain


def reference_gptq(W: Tensor, encoding: Encoding, H: Tensor, damping: float = 0.01) -> Tensor:
    """The paper's loop, column by column in float64, with one scale per row."""
    H = H.double() + damping * H.double().diagonal().mean() * torch.eye(len(H))
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    qparams = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    V, codes = W.double().clone(), []
    for j in range(len(H)):
        codes.append(numerics.quantize(V[:, j : j + 1], qparams, encoding))
        e = (V[:, j] - numerics.dequantize(codes[-1], qparams, encoding, torch.float64)[:, 0]) / U[j, j]
        V[:, j:] -= e[:, None] * U[j, j:]
    return torch.cat(codes, 1)


@pytest.mark.parametrize("text", ["i4[1,-1]", "u3[1,-1]"])
def test_gptq_is_the_published_loop(text):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    codes, _ = PLAIN.round_weight(W, encoding, Evidence(H))
    assert (codes != reference_gptq(W, encoding, H)).float().mean() < 0.005  # float32 may break a tie


@pytest.mark.parametrize("text", ["u3[1,16]", "i4[1,-1]", "u2[1,7]"])
@pytest.mark.parametrize("block", [1, 5, 16, 24])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_of_lazy_updates_does_not_change_the_result(text, block, act_order):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    whole, _ = GPTQ(act_order=act_order, search=False, sweeps=0).round_weight(W, encoding, Evidence(H))
    codes, _ = GPTQ(act_order=act_order, search=False, sweeps=0, block=block).round_weight(W, encoding, Evidence(H))
    assert (codes != whole).float().mean() < 0.01


def test_act_order_is_the_plain_order_of_a_permuted_weight():
    encoding, W, H = Encoding.parse("u3[1,-1]"), weight(), gram()
    order = H.diagonal().argsort(descending=True)
    plain, _ = GPTQ(search=False, sweeps=0).round_weight(W[:, order], encoding, Evidence(H[order][:, order]))
    active, _ = GPTQ(search=False, sweeps=0, act_order=True).round_weight(W, encoding, Evidence(H))
    assert (active[:, order] != plain).float().mean() < 0.005


def test_rows_are_rounded_alone():
    encoding, W, H = Encoding.parse("u3[1,16]"), weight(), gram()
    whole, qparams = GPTQ().round_weight(W, encoding, Evidence(H))
    part, parameters = GPTQ().round_weight(W[3:5], encoding, Evidence(H))
    assert (whole[3:5] != part).float().mean() < 0.02
    torch.testing.assert_close(qparams.scale[3:5], parameters.scale, rtol=1e-2, atol=0)


def test_columns_that_no_input_reaches_are_rounded_to_nearest():
    encoding, W, X = Encoding.parse("u4[1,-1]"), weight(), inputs()
    dead = torch.tensor([0, 7, 39])
    X[:, dead] = 0
    codes, _ = PLAIN.round_weight(W, encoding, Evidence(X.T @ X))
    assert torch.equal(codes[:, dead], Nearest().round_weight(W, encoding)[0][:, dead])
    codes, _ = PLAIN.round_weight(W, encoding, Evidence(torch.zeros(40, 40)))
    assert torch.equal(codes, Nearest().round_weight(W, encoding)[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 37), st.integers(1, 40), st.booleans())
def test_every_shape_and_group_is_rounded(N, K, group, act_order):
    W = weight(N, K)
    codes, qparams = GPTQ(act_order=act_order, block=8, sweeps=1).round_weight(W, Encoding.parse(f"u3[1,{group}]"), Evidence(gram(K)))
    assert codes.shape == W.shape
    assert qparams.scale.shape == (N, -(-K // min(group, K)))


def test_weights_in_other_dtypes_are_rounded_in_float32_and_left_alone():
    encoding, W, H = Encoding.parse("u4[1,16]"), weight().bfloat16(), gram()
    before = W.clone()
    codes, _ = GPTQ().round_weight(W, encoding, Evidence(H))
    assert torch.equal(codes, GPTQ().round_weight(W.float(), encoding, Evidence(H.double()))[0])
    assert torch.equal(W, before)
