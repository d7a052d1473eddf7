import pytest
import torch

from ir import edit
from ir.numerics import code_range
from ir.rounding import Evidence, Nearest
from ir.weights import unrounded
from passes.learning.codes import Codes
from tests.families import load
from tests.passes.samples import run


def annotated(bits):
    """A graph, and a linear of it that is annotated with `bits`."""
    gm = load("llama").graph()
    run(gm, f"canonicalize, untie, annotate(scheme='W{bits}A16', group=32, symmetric={bits == 1})")
    return gm, unrounded(gm)[0]


def anywhere(codes, encoding):
    """Codes up to three steps from given ones."""
    least, greatest = code_range(encoding)
    if encoding.bits == 1:
        return torch.where(torch.rand(codes.shape) < 0.3, -codes, codes)
    return (codes + torch.randint(-3, 4, codes.shape)).clamp(least, greatest)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_learning_starts_at_the_codes_that_are_given(bits):
    gm, layer = annotated(bits)
    W = edit.attribute(gm, layer.weight).detach().float()
    nearest, qparams = Nearest().round_weight(W, layer.mark.weight, Evidence())
    for codes in (nearest, anywhere(nearest.int(), layer.mark.weight)):
        found, after = Codes(gm, layer, codes, qparams).result()
        assert torch.equal(found.int(), codes.int())
        assert torch.equal(after.scale, qparams.scale)


def test_offsets_to_nearest_codes_are_zero_and_to_neighbours_stay_within_half_a_step():
    gm, layer = annotated(4)
    W = edit.attribute(gm, layer.weight).detach().float()
    nearest, qparams = Nearest().round_weight(W, layer.mark.weight, Evidence())
    assert not Codes(gm, layer, nearest, qparams).offset.any()
    place = Codes(gm, layer, nearest, qparams)._place()
    other = torch.where(place > nearest, nearest + 1, nearest - 1).clamp(*code_range(layer.mark.weight))
    assert Codes(gm, layer, other, qparams).offset[(other - place).abs() < 1].abs().max() <= 0.5


def test_a_step_moves_offsets_against_the_gradient_only_where_codes_can_follow():
    gm, layer = annotated(2)
    W = edit.attribute(gm, layer.weight).detach().float()
    nearest, qparams = Nearest().round_weight(W, layer.mark.weight, Evidence())
    codes = Codes(gm, layer, nearest, qparams)
    codes.offset[::2] += 10  # far beyond the last code
    before = codes.offset.clone()
    codes.rate = 0.0625
    levels, free = codes.levels()
    codes.learn(torch.ones_like(W), levels, free)
    assert free[1::2].all() and not free[::2].any()
    assert torch.equal(codes.offset[1::2], before[1::2] - 0.0625)
    assert torch.equal(codes.offset[::2], before[::2])
