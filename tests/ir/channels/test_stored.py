import pytest

from ir.channels import Map
from tests.ir.channels.samples import group_of, sample, verdict

SCALE, ROTATE, LINEAR = Map.SCALE, Map.ROTATE, Map.LINEAR


@pytest.mark.parametrize(
    ("name", "kind", "verdict_of_a"),
    [
        ("read by something else", SCALE, "sum in sum_1 reads a too"),
        ("returned weight", ROTATE, "reads a too"),
        ("experts", LINEAR, "1 x 16"),
        ("one expert", SCALE, "16 x 1"),
        ("part of a weight", ROTATE, "computed, or quantized already"),
        ("half of an axis", ROTATE, "computed, or quantized already"),
        ("scaled weight", SCALE, "computed, or quantized already"),
    ],
)
def test_between_two_linears(name, kind, verdict_of_a):
    assert verdict_of_a in verdict(name, kind, "a")


def test_stacked_experts_are_members_along_two_axes():
    for name, axes in (("experts", (1, 2)), ("one expert", (2, 1)), ("picked experts", (2, 1))):
        read, written = (group_of(sample(name), Map.PERMUTE, "c", axis) for axis in axes)
        assert [(member.path, member.axis) for member in read.readers] == [("c", axes[0])]
        assert [(member.path, member.axis) for member in written.writers] == [("c", axes[1])]


def test_a_weight_that_writes_and_reads_the_same_channels_turns_but_does_not_scale():
    assert verdict("writer and reader", SCALE, "c") == "the map would have to be its own inverse"
    assert verdict("writer and reader", ROTATE, "c") == "1 x 16"
