import pytest
import torch

from ir import edit, evaluate, maps
from ir.capture import capture
from ir.channels import Map
from ir.errors import PassError
from ir.match import aten, find, operand
from ir.verify import verify
from passes.probe import relative_error
from tests.ir.channels.samples import graph, group_of, sample
from tests.mapping import map_all, random_map

INPUTS = [torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]


def weights(gm):
    return {str(node.target): edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}


def differs(gm, other):
    return max(float((tensor - other[name]).abs().max()) for name, tensor in weights(gm).items() if name in other)


def drawn(group, seed=0):
    return random_map(group, torch.Generator().manual_seed(seed))


def rotation(group, seed=0):
    normal = torch.randn(group.blocks, group.block, group.block, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(normal)[0]


@pytest.mark.parametrize("name", ["linears", "rms with gain", "attention", "grouped attention", "gated", "experts"])
def test_scales_and_their_inverses_restore_the_weights(name):
    gm = capture(sample(name))
    before = weights(gm)
    group = group_of(gm, Map.SCALE, "g" if "gain" in name else "v" if "attention" in name else "c" if name == "gated" else "a")
    s = drawn(group)
    maps.apply(gm, group, s)
    assert differs(gm, before) > 0.1
    maps.apply(gm, group, 1 / s)
    assert differs(gm, before) < 1e-12


def test_a_norm_gets_one_gain_however_often_it_is_scaled():
    gm = capture(sample("rms"))
    group = group_of(gm, Map.SCALE, "b", axis=1)
    s = drawn(group)
    before = evaluate.run(gm, INPUTS)
    maps.apply(gm, group, s)
    maps.apply(gm, group, 2 / s)
    (norm,) = find(gm, aten.rms_norm.default)
    assert torch.allclose(edit.attribute(gm, operand(norm, "weight")), torch.tensor(2.0, dtype=torch.float64))
    gm.recompile()
    verify(gm)
    assert relative_error(evaluate.run(gm, INPUTS), before) < 1e-12


@pytest.mark.parametrize("name", ["rms", "grouped attention", "experts", "read in interleaved copies"])
def test_two_rotations_are_their_product(name):
    twice, once = capture(sample(name)), capture(sample(name))
    path = "v" if "attention" in name else "a"
    group = group_of(twice, Map.ROTATE, path)
    Q, R = rotation(group, 1), rotation(group, 2)
    maps.apply(twice, group, Q)
    maps.apply(twice, group, R)
    maps.apply(once, group_of(once, Map.ROTATE, path), R @ Q)
    assert differs(twice, weights(once)) < 1e-12


def test_an_order_is_a_rotation_by_its_matrix():
    ordered, rotated = capture(sample("grouped attention")), capture(sample("grouped attention"))
    group = group_of(ordered, Map.PERMUTE, "v")
    order = drawn(group)
    maps.apply(ordered, group, order)
    maps.apply(rotated, group_of(rotated, Map.ROTATE, "v"), torch.eye(group.block, dtype=torch.float64)[order])
    assert differs(ordered, weights(rotated)) < 1e-12


@pytest.mark.parametrize("kind", [Map.PERMUTE, Map.SCALE, Map.ROTATE, Map.LINEAR])
def test_weights_are_computed_wide_and_stored_as_they_were(kind):
    gm = graph(*_linears(), dtype=torch.bfloat16, a=(16, 16), b=(16, 16))
    wide = {name: tensor.double() for name, tensor in weights(gm).items()}
    group = group_of(gm, kind, "a")
    M = drawn(group)
    maps.apply(gm, group, M)
    for member in group.members:
        found = edit.attribute(gm, member.node)
        expected = maps.mapped(wide[member.path], member, M)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.bfloat16())


def _linears():
    return (lambda x, a, b: torch.nn.functional.linear(torch.nn.functional.linear(x, a), b),)


@pytest.mark.parametrize(("kind", "fits"), [(Map.SCALE, (16,)), (Map.LINEAR, (1, 16, 16))])
def test_maps_are_differentiable(kind, fits):
    group = group_of(sample("linears"), kind, "a")
    M = drawn(group).requires_grad_()
    assert M.shape == fits
    for member in group.members:
        tensor = edit.attribute(sample("linears"), member.node)
        assert torch.autograd.gradcheck(lambda M, member=member, tensor=tensor: maps.mapped(tensor, member, M), M)


def test_the_callers_tensors_are_left_alone():
    gm = capture(sample("linears"))
    before = {name: tensor.clone() for name, tensor in weights(sample("linears")).items()}
    map_all(gm, Map.LINEAR)
    assert differs(sample("linears"), before) == 0


@pytest.mark.parametrize(
    ("kind", "M"),
    [
        (Map.SCALE, torch.zeros(16)),
        (Map.SCALE, -torch.ones(16)),
        (Map.SCALE, torch.full((16,), torch.nan)),
        (Map.SCALE, torch.ones(8)),
        (Map.SCALE, torch.eye(16)[None]),
        (Map.ROTATE, 2 * torch.eye(16)[None]),
        (Map.ROTATE, torch.ones(16)),
        (Map.LINEAR, torch.ones(1, 16, 16)),
        (Map.PERMUTE, torch.zeros(1, 16, dtype=torch.int64)),
        (Map.PERMUTE, torch.eye(16)[None]),
        (Map.SELECT, torch.ones(16)),
    ],
)
def test_what_is_no_map_of_the_kind_is_refused(kind, M):
    gm = capture(sample("linears"))
    before = weights(gm)
    with pytest.raises(PassError):
        maps.apply(gm, group_of(gm, kind, "a"), M)
    assert differs(gm, before) == 0


def test_a_frozen_group_stays_and_says_why():
    gm = capture(sample("gelu"))
    before = weights(gm)
    with pytest.raises(PassError, match="gelu in gelu is not linear"):
        maps.apply(gm, group_of(gm, Map.SCALE, "a"), torch.ones(16))
    assert differs(gm, before) == 0
