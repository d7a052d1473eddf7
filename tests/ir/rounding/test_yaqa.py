from itertools import pairwise

import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import GPTQ, SCALE_DTYPE, YAQA, Evidence, Grid, Nearest
from ir.rounding.factor import factored
from ir.rounding.kronecker import kronecker_error
from ir.rounding.yaqa import round_both_ways
from tests.ir.rounding.samples import gram, weight

N = 12


def factors():
    """Outputs, too, whose errors add up or cancel."""
    return gram(N, seed=2), gram(seed=3)


def found(rounding, encoding, W=None):
    W = weight() if W is None else W
    outer, inner = factors()
    codes, qparams = rounding.round_weight(W, encoding, Evidence(gram=inner, outer=outer, inner=inner))
    return kronecker_error(W - numerics.dequantize(codes, qparams, encoding), outer, inner)


@pytest.mark.parametrize("text", ["u2[1,16]", "u3[1,16]", "i4[1,-1]", "u4[4,16]"])
def test_it_makes_a_smaller_error_than_gptq_and_nearest(text):
    encoding = Encoding.parse(text)
    mine = found(YAQA(), encoding)
    assert mine < 0.9 * found(GPTQ(), encoding)
    assert mine < 0.7 * found(Nearest(search=True), encoding)


@pytest.mark.parametrize("text", ["u2[1,16]", "i3[1,-1]", "i1[1,16]", "u3[5,16]"])
def test_no_sweep_raises_the_error(text):
    errors = [found(YAQA(sweeps=sweeps, damping=0.0), Encoding.parse(text)) for sweeps in range(4)]
    assert all(after <= before * (1 + 1e-3) for before, after in pairwise(errors))
    assert errors[-1] < errors[0]


def test_feedback_goes_over_rows_and_columns_one_entry_after_the_other():
    encoding, W, (outer, inner) = Encoding.parse("u3[1,16]"), weight(), factors()
    qparams = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    U_out, U_in = (factored(H, 0.01)[1] for H in (outer, inner))
    codes = round_both_ways(W, qparams, Grid(encoding), U_out.float(), U_in.float())
    E, W_hat = torch.zeros(N, 40, dtype=torch.float64), W.double().clone()
    scale = numerics.expand(qparams.scale, encoding, (N, 40)).double()
    z = numerics.expand(qparams.zero_point, encoding, (N, 40)).double()
    for i in range(N):
        for j in range(40):
            v = W[i, j].double() - U_out[:, i] @ E @ U_in[:, j]
            W_hat[i, j] = ((v / scale[i, j]).round() + z[i, j]).clamp(0, 7).sub(z[i, j]) * scale[i, j]
            E[i, j] = (v - W_hat[i, j]) / (U_out[i, i] * U_in[j, j])
    torch.testing.assert_close(U_out.T @ E @ U_in, W.double() - W_hat)
    differ = numerics.dequantize(codes, qparams, encoding).double() - W_hat
    assert (differ.abs() > 1e-4).double().mean() < 0.01


@pytest.mark.parametrize("text", ["u2[1,16]", "u4[1,-1]"])
def test_feedback_both_ways_beats_feedback_over_columns(text):
    encoding, W, (outer, inner) = Encoding.parse(text), weight(), factors()
    qparams = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    U_out, U_in = (factored(H, 0.01)[1].float() for H in (outer, inner))

    def error(over_rows):
        codes = round_both_ways(W, qparams, Grid(encoding), over_rows, U_in)
        return kronecker_error(W - numerics.dequantize(codes, qparams, encoding), outer, inner)

    assert error(U_out) < error(torch.eye(N))


def test_independent_outputs_are_rounded_as_by_gptq():
    encoding, W, (_, inner) = Encoding.parse("u3[1,16]"), weight(), factors()
    codes, _ = YAQA(sweeps=0, damping=0.2).round_weight(W, encoding, Evidence(outer=torch.eye(N), inner=inner))
    expected, _ = GPTQ(sweeps=0, damping=0.2).round_weight(W, encoding, Evidence(gram=inner))
    assert (codes != expected).float().mean() < 0.005
