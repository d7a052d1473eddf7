import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir import numerics
from ir.encoding import Encoding, Int
from ir.errors import DataError, OptionError
from ir.smoothing import (
    LEAST,
    N1,
    N2,
    Policy,
    centred,
    layer_error,
    magnitude,
    product,
    rounded,
    scales,
    transformed,
    weight_magnitude,
)
from ir.statistics import TensorStatistics

IN, OUT, TOKENS = 24, 16, 200


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(seed=0):
    """Tokens and a weight whose channels differ tenfold."""
    spread = (normal(IN, seed=seed + 2)).exp()
    return normal(TOKENS, IN, seed=seed) * spread, normal(OUT, IN, seed=seed + 1)


def test_scales_are_the_formula():
    a, w = torch.tensor([4.0, 9.0, 1e-12]), torch.tensor([1.0, 16.0, 1.0])
    torch.testing.assert_close(scales(a, w, 0.5), torch.tensor([2.0, 0.75, LEAST]))
    torch.testing.assert_close(scales(a, torch.ones(3), 1.0)[:2], a[:2])  # AWQ's, β = 1


def test_dead_channels_are_left_alone():
    s = scales(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0]), 0.5)
    assert torch.equal(s, torch.ones(3))


def test_normalised_scales_have_geometric_mean_one_and_the_same_error():
    X, W = layer()
    a, w = magnitude(X), weight_magnitude(W)
    s, t = scales(a, w, 0.5), scales(a, w, 0.5, normalised=True)
    torch.testing.assert_close(t.log().mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer_error(X, W, s)[0], layer_error(X, W, t)[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(centred(s), t)


@pytest.mark.parametrize("a", [torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.inf]), torch.ones(3)])
def test_bad_magnitudes_are_refused(a):
    with pytest.raises(DataError):
        scales(a, torch.ones(2), 0.5)


@given(st.integers(1, 50), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_quantile_of_tokens_is_exact(tokens, q):
    X = normal(tokens, 3, seed=tokens)
    torch.testing.assert_close(magnitude(X, q), X.abs().quantile(q, 0))


def test_statistics_give_what_tokens_give():
    X, _ = layer()
    statistics = TensorStatistics.empty(IN)
    statistics.update(X)
    assert torch.equal(magnitude(statistics), magnitude(X))
    for q in (0.99, 0.5, "mean"):
        torch.testing.assert_close(magnitude(statistics, q), magnitude(X, q), rtol=0.1, atol=1e-3)


def test_a_statistic_that_cannot_be_had_is_refused():
    with pytest.raises(DataError, match="sketch"):
        magnitude(TensorStatistics.empty(3, sketch=False), 0.5)
    with pytest.raises(DataError, match="token"):
        magnitude(torch.empty(0, 3))
    for q in (1.1, -0.1, "median"):
        with pytest.raises(OptionError):
            magnitude(torch.ones(2, 2), q)


def test_all_readers_count_in_the_magnitude_of_weights():
    A, B = normal(4, IN), 3 * normal(5, IN, seed=1)
    assert torch.equal(weight_magnitude([A, B]), weight_magnitude(torch.cat([A, B])))
    assert torch.equal(weight_magnitude(A), A.abs().amax(0))


@given(st.integers(2, 8), st.sampled_from([1.0, 0.7]))
@settings(max_examples=20, deadline=None)
def test_rounding_is_that_of_numerics(bits, clip):
    x = normal(7, IN, seed=bits)
    x[3] = 0
    encoding = Encoding(Int(bits), (1, -1))
    expected = numerics.qparams_from_range(x.amin(-1, keepdim=True) * 0 - clip * x.abs().amax(-1, keepdim=True), x[:, :1] * 0, encoding)
    torch.testing.assert_close(rounded(x, bits, clip), numerics.fake_quantize(x, encoding, expected))
    assert rounded(x, None, clip) is x


def test_a_clip_may_differ_by_row():
    x, clip = normal(7, IN), torch.linspace(0.5, 1, 7)
    expected = torch.cat([rounded(row.unsqueeze(0), 4, float(c)) for row, c in zip(x, clip, strict=True)])
    torch.testing.assert_close(rounded(x, 4, clip), expected)


@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("size", [IN, 22])  # 22: blocks of two
def test_the_transform_keeps_the_function(hadamard, size):
    X, W = normal(9, size, dtype=torch.float64), normal(5, size, seed=1, dtype=torch.float64)
    X_hat, W_hat = transformed(X, W, normal(size, seed=2, dtype=torch.float64).exp(), hadamard)
    torch.testing.assert_close(X_hat @ W_hat.T, X @ W.T, rtol=1e-11, atol=1e-11)


def test_the_error_without_quantization_is_none_and_falls_with_bits():
    X, W = layer()
    assert layer_error(X, W, None, None, None)[1] < 1e-6
    errors = [float(layer_error(X, W, None, bits, bits)[0]) for bits in (8, 6, 4, 2)]
    assert errors == sorted(errors)
    E, relative = layer_error(X, W)
    torch.testing.assert_close(relative, E / (X @ W.T).norm())


def test_clipping_may_differ_by_output_channel():
    X, W = layer()
    torch.testing.assert_close(layer_error(X, W, clip_w=torch.full((OUT,), 0.8))[0], layer_error(X, W, clip_w=0.8)[0])


def test_the_grids_are_those_of_the_paper():
    assert len(N1) == 21 and N1[0] == Policy(0.25, 1.0) and N1[-1] == Policy(0.75, 1.0) and Policy() in N1
    assert len(N2) == 16 and N2[-1] == Policy() and N2[0].q == pytest.approx(0.95)
    assert [1 - p.q for p in N2[:-1]] == sorted((1 - p.q for p in N2[:-1]), reverse=True)
    assert len(product((0.4, 0.5), (1.0, "mean"))) == 4
