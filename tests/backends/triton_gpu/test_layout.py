import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.triton_gpu import layout
from ir.errors import OptionError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.sampled_from([8, 16]), st.integers(1, 9), st.integers(1, 700), st.integers(0, 2**32))
def test_unpacking_gives_back_what_was_packed(bits: int, container: int, n: int, k: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes = layout.pack(codes, bits, container)
    assert torch.equal(layout.unpack(planes, bits, k), codes)
    for plane, width in zip(planes, layout.PLANES[bits], strict=True):
        assert plane.shape == (-(-k // layout.span(width, container)), n, layout.LANES)
        assert plane.dtype == layout.CONTAINERS[container]


def test_a_slot_holds_consecutive_columns() -> None:
    codes = torch.zeros(2, 256, dtype=torch.uint8)
    block, slot, lane = 1, 2, 5
    codes[1, (block * 4 + slot) * 32 + lane] = 11
    (plane,) = layout.pack(codes, 4, 16)
    assert plane.view(torch.int16)[block, 1, lane] == 11 << (4 * slot)
    assert plane.view(torch.int16).count_nonzero() == 1


def test_nothing_is_wasted_where_blocks_are_full() -> None:
    codes = torch.zeros(8, 1024, dtype=torch.uint8)
    assert all(
        sum(p.numel() * p.element_size() for p in layout.pack(codes, bits, container)) == 8 * 1024 * bits // 8
        for bits in layout.PLANES
        for container in layout.CONTAINERS
    )


@pytest.mark.parametrize(("codes", "bits"), [(torch.full((1, 32), 4, dtype=torch.uint8), 2), (torch.zeros(1, 32), 4), (torch.zeros(3), 9)])
def test_what_has_no_layout_is_refused(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(OptionError):
        layout.pack(codes, bits, 16)
