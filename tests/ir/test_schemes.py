import pytest

from ir.errors import OptionError
from ir.schemes import SCHEMES, bits_of, change_bits
from ir.sites import layers
from tests.families import load
from tests.passes.samples import run


def test_schemes():
    assert bits_of("W4A8", "") == (4, 8)
    assert all(name == f"W{w}A{a}" for name, (w, a) in SCHEMES.items())
    with pytest.raises(OptionError, match="W9A9"):
        bits_of("W9A9", "here")
    gm = load("llama").graph()
    run(gm, "canonicalize, untie, annotate(scheme='W4A16')")
    layer = next(layer for layer in layers(gm) if layer.site("weight").encoding)
    assert tuple(map(str, change_bits(layer, "W8A8"))) == ("i8[1,-1]dynamic", "i8[1,-1]")
    assert tuple(map(str, change_bits(layer, "W1A16"))) == ("None", "i1[1,-1]")
