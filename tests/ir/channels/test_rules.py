"""The law of channel groups, for every row of the rules: a map of a group that is not frozen keeps the function."""

import pytest
import torch

from ir import evaluate
from ir.capture import capture
from ir.channels import Map, channel_groups, elementwise, layers, structure
from ir.channels.rules import RULES
from ir.match import aten
from ir.verify import verify
from passes.probe import relative_error
from tests.ir.channels.samples import SAMPLES, graph, sample, verdict
from tests.mapping import map_all


@pytest.mark.parametrize("name", SAMPLES)
def test_maps_of_free_groups_keep_the_function(name):
    inputs = [torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    for kind in (Map.PERMUTE, Map.SCALE, Map.ROTATE, Map.LINEAR):
        gm = capture(sample(name))
        before = evaluate.run(gm, inputs)
        groups = map_all(gm, kind)
        verify(gm)
        assert relative_error(evaluate.run(gm, inputs), before) < 1e-9, [str(group) for group in groups]


def test_no_operator_has_two_rows():
    assert len(RULES) == len(layers.ROWS) + len(elementwise.ROWS) + len(structure.ROWS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("softmax", "no rule says what softmax in softmax does to channels"),
        ("running sum", "no rule says what cumsum"),
        ("hadamard", "no rule says what hadamard"),
        ("attention with a mask of channels", "reads it as its attn_mask"),
    ],
)
def test_what_no_row_answers_for_is_frozen(name, reason):
    for kind in (Map.SCALE, Map.ROTATE, Map.PERMUTE):
        assert reason in verdict(name, kind, "o" if "mask" in name else "a")


def test_a_graph_without_layers_has_no_groups():
    gm = graph(lambda x: torch.relu(x) + 1)
    assert [group for kind in Map for group in channel_groups(gm, kind)] == []


def test_calls_without_a_schema_freeze_what_they_read():
    gm = capture(sample("linears"))
    first, _ = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    with gm.graph.inserting_after(first):
        doubled = gm.graph.call_function(torch.add, (first, first))
    first.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    doubled.meta["val"] = first.meta["val"]
    assert all(group.reason for group in channel_groups(gm, Map.ROTATE))
