import pytest

from ir.channels import Map
from tests.ir.channels.samples import verdict

SCALE, ROTATE, LINEAR, PERMUTE, SELECT = Map.SCALE, Map.ROTATE, Map.LINEAR, Map.PERMUTE, Map.SELECT


@pytest.mark.parametrize(
    ("name", "kind", "verdict_of_a"),
    [
        ("relu", SCALE, "16 x 1"),
        ("relu", PERMUTE, "1 x 16"),
        ("relu", ROTATE, "relu in relu is not linear"),
        ("gelu", SCALE, "gelu in gelu is not linear"),
        ("gelu", SELECT, "16 x 1"),
        ("absolute", SCALE, "16 x 1"),
        ("absolute", LINEAR, "not linear"),
        ("square", SCALE, "multiplies channel by channel"),
        ("square", PERMUTE, "1 x 16"),
        ("gated", SCALE, "silu in silu is not linear"),
        ("gated", PERMUTE, "1 x 16"),
        ("bilinear", SCALE, "16 x 1"),  # of two, the first
        ("gain", SCALE, "16 x 1"),
        ("gain", ROTATE, "scales its channels"),
        ("gain", PERMUTE, "1 x 16"),
        ("gain by head", LINEAR, "4 x 4"),
        ("gain by head", SELECT, "4 x 1"),
        ("gain by head of values", SELECT, "4 x 1"),
        ("softmax", SELECT, "runs over all its channels"),
        ("gain by head of values", ROTATE, "4 x 4"),
        ("gain of the input", PERMUTE, "scales its channels"),
        ("gain of the input", SCALE, "16 x 1"),
        ("gain by token", LINEAR, "1 x 16"),
        ("inverse", PERMUTE, "no rule says what reciprocal"),
        ("quotient", SCALE, "multiplies channel by channel"),
        ("offset", SCALE, "adds what was not followed"),  # 3·c is computed
        ("position table", LINEAR, "1 x 16"),
        ("sum with the input", SCALE, "adds what was not followed"),
        ("sum with a number", PERMUTE, "1 x 16"),
        ("sum with a number", SCALE, "adds what was not followed"),
        ("sum of a row", SCALE, "1 x 1"),  # one scale for all
        ("whole numbers", PERMUTE, "makes whole numbers of it"),
    ],
)
def test_between_two_linears(name, kind, verdict_of_a):
    assert verdict_of_a in verdict(name, kind, "a")


@pytest.mark.parametrize(
    ("name", "kind", "path", "expected"),
    [
        ("gated", SCALE, "c", "16 x 1"),
        ("bilinear", SCALE, "c", "passes the scales of its first operand"),
        ("gain", PERMUTE, "g", "1 x 16"),
        ("gain by head of values", ROTATE, "g", "scales rows of channels by it"),
        ("position table", ROTATE, "c", "1 x 16"),
    ],
)
def test_the_other_operand(name, kind, path, expected):
    assert expected in verdict(name, kind, path, axis=1 if name == "position table" else 0)


def test_a_factor_that_is_frozen_in_part_passes_no_scales_of_the_other():
    assert "passes the scales of its first operand" in verdict("partly fixed gate", SCALE, "c")
    assert "not linear" in verdict("partly fixed gate", SCALE, "a", at=0)
    assert verdict("partly fixed gate", SCALE, "a", at=8) == "8 x 1"
