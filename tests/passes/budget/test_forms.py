import pytest

from ir.errors import OptionError
from ir.sites import layers
from passes.budget.forms import WHOLE, Form
from tests.families import load


@pytest.mark.parametrize("text", ["u4[1,64]", "i8[1,-1]/i8[1,-1]dynamic", "u2[1,64] 352x256", "u2[1,64]/i4[1,-1]dynamic 256x352"])
def test_text_has_an_exact_inverse(text):
    assert str(Form.parse(text)) == text
    assert str(Form.parse(text).mark) == text.partition(" ")[0]


def test_what_is_no_form_is_refused():
    with pytest.raises(OptionError):
        Form.parse("four bits")


def test_a_form_without_a_shape_is_the_whole_linear():
    layer = layers(load("llama").graph())[1]
    whole, smaller = Form.parse("u4[1,32]"), Form.parse("u4[1,32] 16x64")
    assert whole.shape_of(layer) == tuple(layer.weight.meta["val"].shape)
    assert smaller.shape_of(layer) == (16, 64)
    assert WHOLE.rows(layer, whole) is None and WHOLE.columns(layer, whole) is None
