import pytest
import torch

from ir import edit
from ir.capture import capture
from ir.errors import OptionError
from ir.match import find
from ir.ops import HADAMARD
from passes.rotate_channels import RotateChannels
from tests.passes.maps import DECODERS, OPENED, kept
from tests.passes.samples import Mlp, run, vectors


@pytest.mark.parametrize("family", DECODERS)
def test_all_rotations_keep_the_function(family):
    _, records, _, error = kept(family, f"{OPENED}, rotate_channels(where=['R1', 'R2', 'R3', 'R4'], kind='random_hadamard', seed=3)")
    assert records[-1].sites >= 6
    assert error < 1e-4


@pytest.mark.parametrize(
    ("where", "sites", "operators"),
    [("['R1']", 1, 0), ("['R2']", 2, 0), ("['R3']", 2, 4), ("['R4']", 2, 2)],
)
def test_where_chooses(where, sites, operators):
    gm, records, _, error = kept("llama", f"{OPENED}, rotate_channels(where={where})")
    assert (records[-1].sites, len(find(gm, HADAMARD))) == (sites, operators)
    assert error < 1e-5


def test_without_rotary_embedding_keys_rotate_offline():
    gm, records, _, error = kept("opt", f"{OPENED}, rotate_channels(where=['R3'])")
    assert (records[-1].sites, len(find(gm, HADAMARD))) == (2, 0)
    assert error < 1e-5


def test_a_stream_that_cannot_be_rotated_is_noted():
    _, _, ctx, _ = kept("gemma2", f"{OPENED}, rotate_channels(where=['R1'])")
    assert any("R1 left out" in note and "gain" in note for note in ctx.notes)


def test_rotation_spreads_outliers():
    model = Mlp()
    model.up.weight.data[3] *= 100
    gm = capture(model, (vectors(),))
    before = edit.attribute(gm, next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == "down.weight")).clone()
    x = torch.relu(torch.nn.functional.linear(vectors(), model.up.weight, model.up.bias))
    run(gm, "canonicalize, rotate_channels(where=['R4'])")
    (turned,) = find(gm, HADAMARD)
    y = HADAMARD(x, 128)
    assert (y.abs().amax(-1) / y.norm(dim=-1)).mean() < 0.5 * (x.abs().amax(-1) / x.norm(dim=-1)).mean()
    after = edit.attribute(gm, next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == "down.weight"))
    torch.testing.assert_close(HADAMARD(x, 128) @ after.T, x @ before.T, rtol=1e-4, atol=1e-4)
    assert turned.args[1] == 128


def test_blocks_are_limited_for_runtimes_with_a_kernel():
    gm, _, _, error = kept("llama", f"{OPENED}, rotate_channels(block=16)")
    assert {node.args[1] for node in find(gm, HADAMARD)} == {16}
    assert error < 1e-5


def test_only_annotated_inputs_are_rotated_online():
    gm, _, _, _ = kept("llama", f"{OPENED}, annotate(ignore=['re:.*layers.0.*']), rotate_channels(where=['R4'])")
    assert len(find(gm, HADAMARD)) == 1


def test_seeds_draw_other_rotations():
    graphs = [kept("llama", f"{OPENED}, rotate_channels(where=['R1'], kind='orthogonal', seed={seed})")[0] for seed in (0, 0, 1)]
    first, again, other = (edit.attribute(gm, gm.graph.find_nodes(op="get_attr")[0]) for gm in graphs)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("options", [{"where": ("R5",)}, {"where": ()}, {"kind": "fourier"}, {"block": 6}])
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError, match=r"rotat|order"):
        RotateChannels(**options)
