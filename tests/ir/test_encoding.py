import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.encoding import Encoding, Float, Int
from ir.errors import OptionError

blocks = st.lists(st.one_of(st.just(-1), st.integers(1, 4096)), min_size=1, max_size=3).map(tuple)
integers = st.builds(Encoding, st.integers(2, 8).map(Int), blocks, st.booleans(), st.booleans())
floats = st.builds(Encoding, st.sampled_from([Float(4, 3), Float(5, 2)]), blocks, st.just(True), st.booleans())
clipped = st.builds(
    lambda bits, block, symmetric, clip: Encoding(Int(bits), block, symmetric, dynamic=True, clip=clip),
    st.integers(2, 8),
    blocks,
    st.booleans(),
    st.floats(1e-3, 1),
)
encodings = st.one_of(integers, floats, clipped, st.builds(Encoding, st.just(Int(1)), blocks))


@given(encodings)
def test_parsing_is_the_inverse_of_printing(encoding):
    assert Encoding.parse(str(encoding)) == encoding


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        (Encoding(Int(4), (1, 128)), "i4[1,128]"),
        (Encoding(Int(4), (1, 64), symmetric=False), "u4[1,64]"),
        (Encoding(Float(4, 3), (-1,)), "f8e4m3[-1]"),
        (Encoding(Int(8), (1, -1), dynamic=True), "i8[1,-1]dynamic"),
        (Encoding(Int(4), (1, -1), dynamic=True, clip=0.9), "i4[1,-1]dynamic*0.9"),
    ],
)
def test_text_forms(encoding, text):
    assert str(encoding) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "i4",
        "i9[1]",
        "i0[1]",
        "u1[-1]",
        "i4[]",
        "i4[0]",
        "i4[-2]",
        "i4[1,]",
        "f8e4m2[1]",
        "i4[1] ",
        "x4[1]",
        "i4[1]dyn",
        "i4[1]dynamic*1.5",
    ],
)
def test_malformed_text_is_refused(text):
    with pytest.raises(OptionError):
        Encoding.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "scales"),
    [
        ("i8[-1]", (3, 4, 5), (1, 1, 1)),
        ("i8[1,-1]", (3, 4, 5), (3, 4, 1)),
        ("i4[1,64]", (8, 192), (8, 3)),
        ("i4[1,64]", (8, 100), (8, 2)),
        ("i4[1,64]", (8, 10), (8, 1)),
        ("i8[1,-1]", (5,), (1,)),
        ("i8[2,3]", (4, 6), (2, 2)),
    ],
)
def test_scales_have_one_entry_per_block(text, shape, scales):
    assert Encoding.parse(text).scale_shape(shape) == scales


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"dynamic": True, "clip": 0.0}, {"dynamic": True, "clip": 1.1}])
def test_a_clip_is_a_ratio_of_dynamic_scales(options):
    with pytest.raises(OptionError):
        Encoding(Int(4), (-1,), **options)


@pytest.mark.parametrize("sizes", ["9" * 11, ",".join("1" * 9), "1,٢"])
def test_sizes_that_no_tensor_has_are_no_encoding(sizes):
    with pytest.raises(OptionError, match="not an encoding"):
        Encoding.parse(f"i4[{sizes}]")
