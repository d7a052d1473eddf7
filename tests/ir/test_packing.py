import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir.encoding import Encoding, Int
from ir.numerics import code_range, storage_dtype
from ir.packing import container, pack, per_byte, unpack


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 99), rows=st.integers(0, 3))
def test_unpacking_restores_every_code(bits, symmetric, seed, rows):
    encoding = Encoding(Int(bits), (1, -1), symmetric=symmetric)
    low, high = code_range(encoding)
    codes = torch.randint(low, high + 1, (2, rows, 8), generator=torch.Generator().manual_seed(seed)).to(storage_dtype(encoding))
    packed = pack(codes, encoding)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, 8 // per_byte(encoding))
    assert torch.equal(unpack(packed, encoding), codes)


@pytest.mark.parametrize(("text", "packed"), [("u4[1,-1]", [0x31, 0x42]), ("u2[1,-1]", [0b00_11_10_01]), ("i4[1,-1]", [0xB9, 0xCA])])
def test_planes_lie_in_the_bits_of_a_byte(text, packed):
    codes = [1, 2, 3, 0] if text.startswith("u2") else [1, 2, 3, 4]
    encoding = Encoding.parse(text)
    assert pack(torch.tensor(codes, dtype=storage_dtype(encoding)), encoding).tolist() == packed


@pytest.mark.parametrize("text", ["f8e4m3[-1]", "f8e5m2[-1]"])
def test_floats_are_kept_as_their_bits(text):
    encoding, codes = Encoding.parse(text), torch.arange(256).to(torch.uint8)
    floats = unpack(codes, encoding)
    assert floats.dtype == storage_dtype(encoding)
    assert torch.equal(pack(floats, encoding), codes)


def test_widths_that_do_not_divide_a_byte_go_into_the_next_that_does():
    assert [container(Encoding(Int(bits), (1,))) for bits in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]
