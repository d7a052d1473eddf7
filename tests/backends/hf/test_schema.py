import pytest
from compressed_tensors.quantization import QuantizationConfig

from backends.hf.schema import MIXED, PACKED, Quantization, Scheme, kept, refusal
from ir.encoding import Encoding

TOKEN = "i8[1,-1]dynamic"


def scheme(weight, given=None, shape=(64, 96)):
    return Scheme.of(Encoding.parse(weight), None if given is None else Encoding.parse(given), shape)


@pytest.mark.parametrize(
    ("operator", "weight", "given", "said"),
    [
        ("Linear", "u4[1,32]", None, None),
        ("Linear", "i1[1,-1]", None, None),
        ("Linear", "i8[1,128]", None, None),  # one group, wider than a row
        ("Linear", "i4[1,-1]", TOKEN, None),
        ("Linear", "i8[1,-1]", "u8[-1]", None),
        ("Linear", "f8e4m3[1,-1]", "f8e4m3[1,-1]dynamic", None),
        ("Linear", "i4[1,64]", None, "groups of 64 do not divide rows of 96"),
        ("Linear", "i4[16,32]", None, "one scale per channel"),
        ("Linear", "i4[1,-1]dynamic", None, "cannot be dynamic"),
        ("Linear", "f8e5m2[1,-1]", None, "one 8-bit float"),
        ("Linear", "f8e4m3[1,32]", None, "8-bit floats"),
        ("Linear", "i8[1,-1]", "i8[1,-1]dynamic*0.9", "leave out clip_activations"),
        ("Linear", "i8[1,-1]", "i8[1,32]dynamic", "per token"),
        ("Linear", "i8[1,-1]", "f8e4m3[1,-1]dynamic", "no format"),
        ("Linear", "i8[1,-1]", "i1[1,-1]dynamic", "two bits"),
        ("Linear", None, TOKEN, "a rounded weight too"),
        ("Embedding", "i8[1,-1]", None, "no quantized embedding"),
    ],
)
def test_what_has_a_place_in_a_checkpoint(operator, weight, given, said):
    named = {"weight": weight, "input": given}
    found = refusal(operator, {name: Encoding.parse(text) for name, text in named.items() if text is not None}, (64, 96))
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("f8e4m3[-1]", "f8e4m3[-1]", None),
        ("i8[-1]", "i8[-1]", None),
        ("i4[-1,1,-1,-1]", "i4[-1,1,-1,-1]", None),
        ("i8[-1]", "i4[-1]", "alike"),
        ("i8[-1]", None, "alike"),
        ("i8[1,-1]dynamic", "i8[1,-1]dynamic", "at run time"),
        ("u8[-1]", "u8[-1]", "zero points"),
        ("f8e5m2[-1]", "f8e5m2[-1]", "one 8-bit float"),
        ("i8[-1,1,-1,1]", "i8[-1,1,-1,1]", "of a whole layer or of heads"),
    ],
)
def test_what_can_be_stated_of_a_cache(key, value, said):
    named = {"key": key, "value": value}
    found = refusal("Cache", {name: Encoding.parse(text) for name, text in named.items() if text is not None}, (2, 16))
    assert found is None if said is None else (said in found and "quantize_cache(dynamic=False, symmetric=True)" in found)


@pytest.mark.parametrize(
    ("rounded", "packed", "beside_inputs"),
    [
        ("i1[1,-1]", "i2[1,-1]", "i2[1,-1]"),
        ("u3[1,32]", "i4[1,32]", "u3[1,32]"),  # q - z fits in four signed bits
        ("i3[1,32]", "i4[1,32]", "i3[1,32]"),
        ("u4[1,32]", "u4[1,32]", "u4[1,32]"),
        ("u5[1,-1]", "i8[1,-1]", "u5[1,-1]"),
        ("f8e4m3[1,-1]", "f8e4m3[1,-1]", "f8e4m3[1,-1]"),
    ],
)
def test_widths_that_are_kept(rounded, packed, beside_inputs):
    assert str(kept(Encoding.parse(rounded), None)) == packed
    assert str(kept(Encoding.parse(rounded), Encoding.parse(TOKEN))) == beside_inputs


@pytest.mark.parametrize("given", [None, "i8[1,-1]dynamic", "u8[-1]", "i8[-1]dynamic"])
@pytest.mark.parametrize("weight", ["u4[1,32]", "i8[1,-1]", "i2[1,-1]"])
def test_a_scheme_states_encodings(weight, given):
    stated = scheme(weight, given)
    assert str(stated.weights.encoding) == weight
    assert (stated.input_activations and str(stated.input_activations.encoding)) == given


def test_one_scheme_means_all_linears_but_those_that_are_ignored():
    found = Quantization.of({"a": scheme("i4[1,32]"), "b": scheme("i4[1,32]")}, ["a", "b", "head"])
    assert (found.format, found.config_groups["group_0"].targets, found.ignore) == (PACKED, ("Linear",), ["head"])
    assert set(found.schemes(["a", "b", "head"])) == {"a", "b"}


def test_several_schemes_name_their_linears_and_compressed_tensors_reads_them():
    made = {"a": scheme("u4[1,32]"), "b": scheme("i8[1,-1]", TOKEN), "c": scheme("f8e4m3[1,-1]"), "d": scheme("u4[1,32]")}
    found = Quantization.of(made, [*made, "head"])
    assert found.format == MIXED
    assert {name: own.model_copy(update={"targets": ()}) for name, own in found.schemes([*made, "head"]).items()} == made
    assert Quantization.model_validate(found.to_json()) == found
    read = QuantizationConfig.model_validate(found.to_json())
    assert [group.targets for group in read.config_groups.values()] == [["a", "d"], ["b"], ["c"]]
    assert [group.format for group in read.config_groups.values()] == ["pack-quantized", "int-quantized", "float-quantized"]
    assert read.config_groups["group_1"].input_activations.strategy == "token"
