import pytest
import torch

from ir import edit, maps
from ir.channels import Map, channel_groups
from passes.probe import model_outputs, relative_error
from tests.families import load
from tests.passes.samples import run


def test_two_steps_are_compared_and_caches_are_private():
    gm = load("llama").graph()
    probe = gm.meta["example"]
    outputs = model_outputs(gm, probe)
    assert [tuple(value.shape[:2]) for value in outputs] == [tuple(probe[0].shape), (probe[0].shape[0], 1)]


def test_a_change_of_what_the_cache_holds_is_no_difference():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    before = model_outputs(gm, gm.meta["example"])
    for group in channel_groups(gm, Map.SCALE):
        if not group.reason and "v_proj" in str(group):
            maps.apply(gm, group, torch.linspace(0.5, 2, group.size, dtype=torch.float64))
    assert relative_error(model_outputs(gm, gm.meta["example"]), before) < 1e-5


def test_a_broken_cache_shows_in_the_second_step():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    before = model_outputs(gm, gm.meta["example"])
    outputs = list(gm.graph.output_node().args[0])
    doubled = edit.emit(gm, torch.ops.aten.mul.Tensor, (outputs[1], 2.0), before=gm.graph.output_node())
    gm.graph.output_node().args = ((outputs[0], doubled, *outputs[2:]),)
    after = model_outputs(gm, gm.meta["example"])
    assert relative_error(after[:1], before[:1]) == 0
    assert relative_error(after[1:], before[1:]) > 1e-3


def test_without_a_probe_there_is_nothing_to_compare():
    assert model_outputs(load("llama").graph(), ()) == ()


def test_relative_error_needs_as_many_outputs():
    with pytest.raises(ValueError, match="zip"):
        relative_error((torch.ones(1),), ())
