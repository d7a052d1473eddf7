import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.rounding import GPTQ, SCALE_DTYPE, Nearest, descend, propagate_error, search_qparams

PLAIN = GPTQ(search=False, sweeps=0)
ENCODINGS = [
    *(f"{letter}{bits}[1,16]" for letter in "iu" for bits in (2, 3, 4, 8)),
    "i5[1,-1]",
    "u6[1,-1]",
    "i4[-1]",
    "u3[-1]",
    "u4[4,16]",
    "i7[5,-1]",
]
FEW = ["i2[1,16]", "u3[1,16]", "i5[1,-1]", "u4[4,16]", "u3[-1]"]
ODD = ["i1[1,16]", "f8e4m3[1,-1]", "f8e5m2[1,16]"]


def weight(N: int = 12, K: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def inputs(K: int = 40, tokens: int = 200, seed: int = 1) -> Tensor:
    """Correlated channels of unequal size, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.4 * torch.randn(K, K, generator=generator)
    return (torch.randn(tokens, K, generator=generator) @ mix + 0.3) * torch.linspace(0.2, 2, K)[torch.randperm(K, generator=generator)]


def gram(K: int = 40, seed: int = 1) -> Tensor:
    X = inputs(K, seed=seed)
    return X.T @ X


def output_error(W: Tensor, codes: Tensor, qparams: numerics.QParams, encoding: Encoding, H: Tensor) -> Tensor:
    D = W.double() - numerics.dequantize(codes, qparams, encoding, torch.float64)
    return (D @ H.double() * D).sum(1)


def error(rounding, encoding: Encoding, W: Tensor, H: Tensor) -> float:
    codes, qparams = rounding.round_weight(W, encoding, H)
    return float(output_error(W, codes, qparams, encoding, H).sum())


@pytest.mark.parametrize("text", ENCODINGS + ODD)
@pytest.mark.parametrize("rounding", [Nearest(search=True), GPTQ(sweeps=1), GPTQ(act_order=True, sweeps=1)])
def test_codes_and_parameters_follow_the_convention(text, rounding):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = rounding.round_weight(W, encoding, gram())
    least = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    assert codes.shape == W.shape
    assert codes.is_contiguous()
    assert codes.dtype == numerics.storage_dtype(encoding)
    assert qparams.scale.shape == least.scale.shape
    assert qparams.scale.dtype == SCALE_DTYPE
    assert (qparams.zero_point is None) == encoding.symmetric
    if qparams.zero_point is not None:
        assert qparams.zero_point.shape == least.scale.shape
        assert qparams.zero_point.dtype == torch.uint8
        assert int(qparams.zero_point.max()) < 2**encoding.bits
    if codes.dtype in (torch.int8, torch.uint8):
        low, high = numerics.code_range(encoding)
        assert low <= int(codes.min()) <= int(codes.max()) <= high
    assert torch.isfinite(numerics.dequantize(codes, qparams, encoding)).all()


@pytest.mark.parametrize("text", ENCODINGS)
def test_nearest_is_the_arithmetic_of_encodings(text):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = Nearest().round_weight(W, encoding)
    expected = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    assert torch.equal(qparams.scale, expected.scale)
    assert torch.equal(codes, numerics.quantize(W, expected, encoding))


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("rounding", [PLAIN, GPTQ(search=False, sweeps=0, act_order=True)])
def test_gptq_is_nearest_when_inputs_are_uncorrelated(text, rounding):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = rounding.round_weight(W, encoding, torch.eye(40))
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
    codes, _ = PLAIN.round_weight(W, encoding, H)
    assert (codes != reference_gptq(W, encoding, H)).float().mean() < 0.005  # float32 may break a tie


@pytest.mark.parametrize("text", ["u3[1,16]", "i4[1,-1]", "u2[1,7]"])
@pytest.mark.parametrize("block", [1, 5, 16, 24])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_of_lazy_updates_does_not_change_the_result(text, block, act_order):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    whole, _ = GPTQ(act_order=act_order, search=False, sweeps=0).round_weight(W, encoding, H)
    codes, _ = GPTQ(act_order=act_order, search=False, sweeps=0, block=block).round_weight(W, encoding, H)
    assert (codes != whole).float().mean() < 0.01


def test_the_block_of_the_descent_does_not_change_the_result(monkeypatch):
    encoding, W, H = Encoding.parse("i4[1,-1]"), weight(), gram()
    whole, _ = descend(W, *Nearest().round_weight(W, encoding), encoding, H, sweeps=2)
    monkeypatch.setattr("ir.rounding._BLOCK", 7)
    codes, _ = descend(W, *Nearest().round_weight(W, encoding), encoding, H, sweeps=2)
    assert (codes != whole).float().mean() < 0.01


def test_act_order_is_the_plain_order_of_a_permuted_weight():
    encoding, W, H = Encoding.parse("u3[1,-1]"), weight(), gram()
    order = H.diagonal().argsort(descending=True)
    plain, _ = GPTQ(search=False, sweeps=0).round_weight(W[:, order], encoding, H[order][:, order])
    active, _ = GPTQ(search=False, sweeps=0, act_order=True).round_weight(W, encoding, H)
    assert (active[:, order] != plain).float().mean() < 0.005


def test_rows_are_rounded_alone():
    encoding, W, H = Encoding.parse("u3[1,16]"), weight(), gram()
    whole, qparams = GPTQ().round_weight(W, encoding, H)
    part, parameters = GPTQ().round_weight(W[3:5], encoding, H)
    assert (whole[3:5] != part).float().mean() < 0.02
    torch.testing.assert_close(qparams.scale[3:5], parameters.scale, rtol=1e-2, atol=0)


def test_columns_that_no_input_reaches_are_rounded_to_nearest():
    encoding, W, X = Encoding.parse("u4[1,-1]"), weight(), inputs()
    dead = torch.tensor([0, 7, 39])
    X[:, dead] = 0
    codes, _ = PLAIN.round_weight(W, encoding, X.T @ X)
    assert torch.equal(codes[:, dead], Nearest().round_weight(W, encoding)[0][:, dead])
    codes, _ = PLAIN.round_weight(W, encoding, torch.zeros(40, 40))
    assert torch.equal(codes, Nearest().round_weight(W, encoding)[0])


def test_damping_rises_until_a_singular_or_slightly_indefinite_matrix_can_be_factored():
    encoding, W, X = Encoding.parse("u4[1,16]"), weight(), inputs(tokens=5)
    H = X.T @ X
    assert error(GPTQ(damping=0), encoding, W, H) < error(Nearest(), encoding, W, H)
    H = H - 0.05 * H.diagonal().mean() * torch.eye(40)
    assert GPTQ().round_weight(W, encoding, H)[0].shape == W.shape


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from(ENCODINGS + ODD), st.integers(1, 9), st.integers(1, 45))
def test_no_sweep_raises_the_error(seed, text, N, K):
    encoding, W, H = Encoding.parse(text), weight(N, K, seed), gram(K, seed)
    codes, qparams = Nearest().round_weight(W, encoding)
    before = codes.clone()
    last = float(output_error(W, codes, qparams, encoding, H).sum())
    for sweeps in (1, 2):
        found = float(output_error(W, *descend(W, codes, qparams, encoding, H, sweeps=sweeps), encoding, H).sum())
        assert found <= last * (1 + 1e-4) + 1e-6
        last = found
    assert torch.equal(codes, before)


def test_descent_finds_the_exact_channel_scale():
    encoding, W, H = Encoding.parse("i8[1,-1]"), weight(4), gram()
    codes, qparams = Nearest().round_weight(W, encoding)
    H_small = H * 1e-30 + torch.diag(H.diagonal())  # uncorrelated: codes at their optimum already
    _, fitted = descend(W, codes, qparams, encoding, H_small, sweeps=1)
    q = codes.double()
    exact = (q @ H_small.double() * W).sum(1) / (q @ H_small.double() * q).sum(1)
    torch.testing.assert_close(fitted.scale[:, 0].double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("text", ["u2[1,16]", "i3[1,-1]", "u4[-1]", "i1[1,16]", "f8e4m3[1,-1]"])
def test_searched_scales_are_never_worse_than_the_extremes(text):
    encoding, W = Encoding.parse(text), weight()
    importance = gram().diagonal()
    found, extremes = search_qparams(W, encoding, importance), numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    errors = [float(((W - numerics.fake_quantize(W, encoding, p)).square() * importance).sum()) for p in (found, extremes)]
    assert errors[0] <= errors[1]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 5), st.integers(1, 37), st.integers(1, 40), st.booleans())
def test_every_shape_and_group_is_rounded(N, K, group, act_order):
    W = weight(N, K)
    codes, qparams = GPTQ(act_order=act_order, block=8, sweeps=1).round_weight(W, Encoding.parse(f"u3[1,{group}]"), gram(K))
    assert codes.shape == W.shape
    assert qparams.scale.shape == (N, -(-K // min(group, K)))


def test_weights_in_other_dtypes_are_rounded_in_float32_and_left_alone():
    encoding, W, H = Encoding.parse("u4[1,16]"), weight().bfloat16(), gram()
    before = W.clone()
    codes, _ = GPTQ().round_weight(W, encoding, H)
    assert torch.equal(codes, GPTQ().round_weight(W.float(), encoding, H.double())[0])
    assert torch.equal(W, before)


def test_misuse_is_refused():
    encoding, W, H = Encoding.parse("u4[1,16]"), weight(), gram()
    with pytest.raises(DataError, match="needs the Gram matrix"):
        GPTQ().round_weight(W, encoding)
    for rounding in (Nearest(), GPTQ()):
        with pytest.raises(DataError, match="40"):
            rounding.round_weight(W, encoding, H[:5, :5])
        with pytest.raises(DataError, match="Gram"):
            rounding.round_weight(W, encoding, H * torch.nan)
        with pytest.raises(DataError, match="finite"):
            rounding.round_weight(W / 0, encoding, H)
    with pytest.raises(DataError, match="semidefinite"):
        GPTQ().round_weight(W, encoding, torch.eye(40) - 100 * torch.eye(40).flip(0))
    with pytest.raises(OptionError):
        GPTQ(damping=-1)


def test_propagated_weights_make_up_for_the_error_of_the_inputs():
    W, X = weight(), inputs(tokens=400)
    X_hat = X + 0.3 * inputs(tokens=400, seed=5)
    H, cross = X_hat.T @ X_hat, X.T @ X_hat
    target = propagate_error(W, H, cross, damping=1e-6)
    exact = torch.linalg.lstsq(X_hat.double(), (X @ W.T).double()).solution.T
    torch.testing.assert_close(target.double(), exact, rtol=1e-2, atol=1e-3)
    assert torch.equal(propagate_error(W, H, H), W)
    assert torch.equal(propagate_error(W, H, cross, strength=0.0), W)
