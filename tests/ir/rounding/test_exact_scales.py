import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import GPTQ, Evidence, ExactScales, Nearest
from tests.ir.rounding.samples import ENCODINGS, ODD, error, gram, weight


@pytest.mark.parametrize("text", ENCODINGS + ODD)
def test_it_makes_a_smaller_output_error_than_nearest(text):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    assert error(ExactScales(), encoding, W, H) < error(Nearest(search=True), encoding, W, H)
    assert error(ExactScales(search=False), encoding, W, H) <= error(Nearest(), encoding, W, H)


@pytest.mark.parametrize("text", ["u2[1,16]", "i4[1,-1]"])
def test_gptq_which_moves_the_codes_ends_lower(text):
    encoding, W, H = Encoding.parse(text), weight(), gram()
    assert error(GPTQ(), encoding, W, H) < error(ExactScales(), encoding, W, H)


def test_scales_of_channels_are_the_formula():
    encoding, W, H = Encoding.parse("i3[1,-1]"), weight(), gram()
    codes, qparams = ExactScales(sweeps=1).round_weight(W, encoding, Evidence(gram=H))
    q = codes.double()
    exact = (q @ H.double() * W).sum(1) / (q @ H.double() * q).sum(1)
    torch.testing.assert_close(qparams.scale[:, 0].double(), exact, rtol=1e-3, atol=0)


def test_one_bit_is_a_sign_with_an_exact_scale():
    encoding, W, H = Encoding.parse("i1[1,16]"), weight(), gram()
    codes, _ = ExactScales().round_weight(W, encoding, Evidence(gram=H))
    assert torch.equal(codes, torch.where(W < 0, -1, 1).to(numerics.storage_dtype(encoding)))
    plain = error(Nearest(), encoding, W, H)
    assert error(GPTQ(), encoding, W, H) < error(ExactScales(), encoding, W, H) < plain
