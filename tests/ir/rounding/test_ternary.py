import itertools

import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.rounding import Evidence, Nearest, Ternary
from ir.rounding.ternary import TernaryGrid
from tests.ir.rounding.samples import error, gram, output_error, weight


@pytest.mark.parametrize("text", ["i2[1,16]", "i2[1,-1]", "i2[4,16]", "i2[-1]", "i2[1,7]"])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_uses_three_codes_and_beats_plain_thresholds(text, act_order):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    codes, _ = Ternary(act_order=act_order).round_weight(W, encoding, Evidence(gram=H))
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    grid = TernaryGrid(encoding)
    qparams = grid.choose(W, H.diagonal())
    plain = float(
        output_error(W, grid.nearest(W, numerics.expand(qparams.scale.float(), encoding, (*W.shape,)), None), qparams, encoding, H).sum()
    )
    loop = error(Ternary(act_order=act_order, sweeps=0), encoding, W, H)
    assert loop < plain
    assert error(Ternary(act_order=act_order), encoding, W, H) < loop
    assert loop < error(Nearest(), encoding, W, H)


def test_no_threshold_and_scale_are_better():
    encoding, W = Encoding.parse("i2[1,-1]"), weight(3, 7)
    d = torch.linspace(0.1, 2, 7)
    grid = TernaryGrid(encoding)
    qparams = grid.choose(W, d)
    D = W - numerics.dequantize(grid.nearest(W, numerics.expand(qparams.scale.float(), encoding, (*W.shape,)), None), qparams, encoding)
    for w, found in zip(W, (D.square() * d).sum(1), strict=True):
        best = torch.inf
        for codes in itertools.product((-1, 0, 1), repeat=7):
            q = torch.tensor(codes, dtype=torch.float32)
            s = (q * w * d).sum() / (q * q * d).sum().clamp_min(1e-9)
            best = min(best, float(((w - s * q).square() * d).sum()))
        assert float(found) == pytest.approx(best, rel=1e-3)


def test_weights_and_channels_of_zeros_stay_finite():
    encoding, W, H = Encoding.parse("i2[1,16]"), weight(), gram()
    W[2], H[:16], H[:, :16] = 0, 0, 0
    codes, qparams = Ternary().round_weight(W, encoding, Evidence(gram=H))
    assert (codes[2] == 0).all()
    assert torch.isfinite(qparams.scale).all()


def test_other_encodings_are_refused():
    for text in ("u2[1,16]", "i3[1,16]", "i1[1,16]"):
        with pytest.raises(OptionError, match="ternary codes are stored as i2"):
            Ternary().round_weight(weight(), Encoding.parse(text), Evidence(gram=gram()))
