import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.encoding import Encoding
from ir.rounding import Grid, Nearest, descend
from tests.ir.rounding.samples import ENCODINGS, ODD, gram, output_error, weight


def test_the_block_of_the_descent_does_not_change_the_result(monkeypatch):
    encoding, W, H = Encoding.parse("i4[1,-1]"), weight(), gram()
    whole, _ = descend(W, *Nearest().round_weight(W, encoding), Grid(encoding), H, sweeps=2)
    monkeypatch.setattr("ir.rounding.descent._BLOCK", 7)
    codes, _ = descend(W, *Nearest().round_weight(W, encoding), Grid(encoding), H, sweeps=2)
    assert (codes != whole).float().mean() < 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from(ENCODINGS + ODD), st.integers(1, 9), st.integers(1, 45))
def test_no_sweep_raises_the_error(seed, text, N, K):
    encoding, W, H = Encoding.parse(text), weight(N, K, seed), gram(K, seed)
    codes, qparams = Nearest().round_weight(W, encoding)
    before = codes.clone()
    last = float(output_error(W, codes, qparams, encoding, H).sum())
    for sweeps in (1, 2):
        found = float(output_error(W, *descend(W, codes, qparams, Grid(encoding), H, sweeps=sweeps), encoding, H).sum())
        assert found <= last * (1 + 1e-4) + 1e-6
        last = found
    assert torch.equal(codes, before)


def test_descent_finds_the_exact_channel_scale():
    encoding, W, H = Encoding.parse("i8[1,-1]"), weight(4), gram()
    codes, qparams = Nearest().round_weight(W, encoding)
    H_small = H * 1e-30 + torch.diag(H.diagonal())  # uncorrelated: codes at their optimum already
    _, fitted = descend(W, codes, qparams, Grid(encoding), H_small, sweeps=1)
    q = codes.double()
    exact = (q @ H_small.double() * W).sum(1) / (q @ H_small.double() * q).sum(1)
    torch.testing.assert_close(fitted.scale[:, 0].double(), exact, rtol=1e-3, atol=0)
