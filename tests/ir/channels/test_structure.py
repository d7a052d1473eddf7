import pytest

from ir.channels import Map
from tests.ir.channels.samples import group_of, sample, verdict

SCALE, ROTATE, LINEAR, PERMUTE, SELECT = Map.SCALE, Map.ROTATE, Map.LINEAR, Map.PERMUTE, Map.SELECT


@pytest.mark.parametrize(
    ("name", "kind", "verdict_of_a"),
    [
        ("turned", ROTATE, "2 x 8"),  # −x₂ is not a rotation's
        ("turned", SELECT, "16 x 1"),
        ("turned and summed", ROTATE, "1 x 8"),
        ("scrambled", PERMUTE, "was not followed"),
        ("heads folded into the batch", PERMUTE, "1 x 16"),
        ("heads first in the batch", PERMUTE, "was not followed"),  # [4·s] could be [4, s] or [s, 4]
        ("copies with gains", ROTATE, "1 x 16"),
        ("read in copies", LINEAR, "1 x 16"),
        ("read in interleaved copies", LINEAR, "1 x 16"),
        ("read mirrored", LINEAR, "not read as whole blocks"),
        ("read mirrored", SCALE, "16 x 1"),
        ("shuffled halves", PERMUTE, "not read as whole blocks"),
        ("halves", PERMUTE, "1 x 8"),
        ("halves", SELECT, "8 x 1"),
        ("interleaved halves", PERMUTE, "1 x 8"),
        ("joined with the input", ROTATE, "joins them with what was not followed"),
        ("joined along tokens", LINEAR, "1 x 16"),
        ("joined with learned tokens", ROTATE, "1 x 16"),
        ("masked", LINEAR, "1 x 16"),
        ("masked by channel", PERMUTE, "tells its channels apart"),
        ("masked by a number", SCALE, "puts other numbers in their place"),
        ("summed heads", ROTATE, "1 x 4"),
        ("summed heads", SELECT, "4 x 1"),  # the same element of all heads
        ("scrambled", SELECT, "was not followed"),
        ("heads folded into the batch", SELECT, "computes a size"),
        ("summed tokens", LINEAR, "1 x 16"),
        ("summed channels", SCALE, "adds up its channels"),
        ("last token", LINEAR, "1 x 16"),
        ("picked tokens", LINEAR, "1 x 16"),
        ("picked channels", PERMUTE, "picks channels"),
        ("repeated heads", LINEAR, "1 x 8"),
        ("repeated channels", SCALE, "repeats channels"),
        ("like", SCALE, "adds what was not followed"),
    ],
)
def test_between_two_linears(name, kind, verdict_of_a):
    assert verdict_of_a in verdict(name, kind, "a")


def test_what_is_joined_with_something_unknown_freezes_alone():
    assert verdict("joined with the input", SCALE, "a", at=8) == "8 x 1"


def test_copies_may_lie_side_by_side_or_element_by_element():
    side_by_side, by_element = (group_of(sample(name), LINEAR, "a") for name in ("read in copies", "read in interleaved copies"))
    assert side_by_side.readers[0].channels.tolist() == [*range(16)] * 4
    assert by_element.readers[0].channels.tolist() == [channel for channel in range(16) for _ in range(4)]
