import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import SCALE_DTYPE, Nearest
from tests.ir.rounding.samples import ENCODINGS, weight


@pytest.mark.parametrize("text", ENCODINGS)
def test_nearest_is_the_arithmetic_of_encodings(text):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = Nearest().round_weight(W, encoding)
    expected = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    assert torch.equal(qparams.scale, expected.scale)
    assert torch.equal(codes, numerics.quantize(W, expected, encoding))
