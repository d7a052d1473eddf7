import pytest

from ir import numerics
from ir.encoding import Encoding
from ir.rounding import SCALE_DTYPE, search_qparams
from tests.ir.rounding.samples import gram, weight


@pytest.mark.parametrize("text", ["u2[1,16]", "i3[1,-1]", "u4[-1]", "i1[1,16]", "f8e4m3[1,-1]"])
def test_searched_scales_are_never_worse_than_the_extremes(text):
    encoding, W = Encoding.parse(text), weight()
    importance = gram().diagonal()
    found, extremes = search_qparams(W, encoding, importance), numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    errors = [float(((W - numerics.fake_quantize(W, encoding, p)).square() * importance).sum()) for p in (found, extremes)]
    assert errors[0] <= errors[1]
