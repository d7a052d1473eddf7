import pytest

from backends.triton_gpu import Triton
from backends.triton_gpu.forms import integer
from ir.encoding import Encoding


def refused(operator: str, shape: tuple[int, ...] = (64, 96), **encodings: str) -> str:
    return Triton().supports(operator, {name: Encoding.parse(text) for name, text in encodings.items()}, shape) or ""


@pytest.mark.parametrize("weight", ["i1[1,32]", "i4[1,-1]", "u3[1,64]", "i8[-1]", "i4[16,32]", "u4[1,96]", "i4[1,128]"])
def test_integers_in_blocks_of_whole_lanes_have_a_place(weight: str) -> None:
    assert not refused("Linear", weight=weight, input="i8[1,-1]dynamic")
    assert not refused("Embedding", weight=weight)


def test_what_has_no_place_is_refused_with_a_way_out() -> None:
    assert "use 1 to 8 bits" in refused("Linear", weight="f8e4m3[1,-1]")
    assert "use groups of 32" in refused("Linear", weight="i4[1,16]")
    assert "use groups of 32" in refused("Embedding", weight="i4[1,48]")
    assert "cannot be dynamic" in refused("Linear", weight="i4[1,-1]dynamic")
    assert "indices" in refused("Embedding", weight="i4[1,-1]", input="i8[1,-1]dynamic")
    assert "two axes" in refused("Linear", shape=(4, 64, 96), weight="i4[1,-1]")
    assert "2 to 8 bits" in refused("Cache", key="i1[1,-1]dynamic")
    assert not refused("Cache", value="u2[1,16]dynamic")
    assert "convolution" in refused("Convolution", weight="i4[1,-1]")


@pytest.mark.parametrize("text", ["i8[1,-1]dynamic", "u4[1,-1]dynamic*0.9", "i2[-1]", "u8[-1]"])
def test_activations_with_a_scale_for_each_token_or_tensor_are_multiplied_as_integers(text: str) -> None:
    assert integer(Encoding.parse(text))


@pytest.mark.parametrize("text", ["i8[1,32]dynamic", "i8[-1]dynamic", "i1[1,-1]dynamic", "f8e4m3[1,-1]dynamic"])
def test_others_are_not(text: str) -> None:
    assert not integer(Encoding.parse(text))
    assert not integer(None)
