import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import Grid, Nearest
from ir.rounding.kronecker import KroneckerDraft, kronecker_error
from tests.ir.rounding.samples import ENCODINGS, ODD, gram, weight


def draft(text):
    encoding, W = Encoding.parse(text), weight()
    return KroneckerDraft(W, *Nearest().round_weight(W, encoding), Grid(encoding), gram(12, seed=2), gram(seed=3))


def error(made):
    W_hat = numerics.dequantize(made.codes, made.qparams, made.encoding)
    torch.testing.assert_close(made.W_hat, W_hat, rtol=1e-3, atol=1e-3)
    D = (made.W - W_hat).double()
    scale = float(made.H_out.trace() * made.H_in.trace())
    torch.testing.assert_close(made.P.double() / scale, made.H_out.double() @ D @ made.H_in.double() / scale, rtol=0, atol=1e-6)
    return kronecker_error(D, made.H_out.double(), made.H_in.double())


@pytest.mark.parametrize("text", ENCODINGS + ODD)
def test_no_move_and_no_scale_raises_the_error(text):
    made = draft(text)
    start = last = error(made)
    for _ in range(2):
        for step in (lambda: made.move_codes(5), made.fit_scales):
            step()
            found = error(made)
            assert found <= last * (1 + 1e-4)
            last = found
    assert last < start


def test_moves_end_where_no_single_code_has_a_better_neighbour():
    made = draft("i3[1,16]")
    made.move_codes(10000)
    best, (low, high) = error(made), numerics.code_range(made.encoding)
    for i in range(0, 12, 3):
        for j in range(0, 40, 7):
            for step in (-1, 1):
                codes = made.codes.clone()
                codes[i, j] = min(max(int(codes[i, j]) + step, low), high)
                D = (made.W - numerics.dequantize(codes, made.qparams, made.encoding)).double()
                assert kronecker_error(D, made.H_out.double(), made.H_in.double()) >= best * (1 - 1e-5)


def test_scales_are_the_optimum_of_all_rows():
    made = draft("i4[1,-1]")
    made.fit_scales()
    best = error(made)
    for row in range(0, 12, 4):
        for factor in (0.99, 1.01):
            scale = made.qparams.scale.double().clone()
            scale[row] *= factor
            D = made.W.double() - made.codes.double() * scale
            assert kronecker_error(D, made.H_out.double(), made.H_in.double()) > best
