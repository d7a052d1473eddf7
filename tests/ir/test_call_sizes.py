"""Every row: a graph whose calls count channels equals its masked twin after some were dropped."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (everyone's name for it)

from ir import edit, evaluate
from ir.channels import Map, channel_groups
from ir.selection import select
from passes.probe import relative_error
from tests.ir.channels.samples import graph

KEPT = torch.tensor([0, 3, 4, 7])
HALVES = {"a": (16, 16), "b": (16, 8)}


def gated(left, right):
    return torch.relu(left) * right


CALLS = {
    "slice": lambda y: gated(y[..., :8], y[..., 8:]),
    "slice from the end": lambda y: gated(y[..., :-8], y[..., -8:]),
    "narrow": lambda y: gated(y.narrow(-1, 0, 8), y.narrow(-1, -8, 8)),
    "split": lambda y: gated(*y.split(8, -1)),
    "split with sizes": lambda y: gated(*y.split([8, 8], -1)),
    "chunk": lambda y: gated(*y.chunk(2, -1)),
    "reshape": lambda y: gated(*y.reshape(y.shape[0], -1, 2, 8).unbind(2)).reshape(y.shape[0], y.shape[1], 8),
    "expand": lambda y: gated(*y.unflatten(-1, (2, 1, 8)).expand(-1, -1, 2, 3, 8).unbind(2)).select(2, 1),
    "repeated": lambda y: gated(*y.unflatten(-1, (2, 8)).repeat_interleave(2, -1, output_size=16).unbind(2)).unflatten(-1, (8, 2))[..., 1],
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_follow_the_channels(name):
    def function(x, a, b):
        return F.linear(CALLS[name](F.linear(x, a)), b)

    gm, twin = graph(function, **HALVES), graph(function, **HALVES)
    group = next(group for group in channel_groups(gm, Map.SELECT) if not group.reason and group.size == 8)
    weight = edit.attribute(twin, next(node for node in twin.graph.find_nodes(op="get_attr") if node.target == "b")).detach().clone()
    weight[:, [1, 2, 5, 6]] = 0
    edit.store(twin, "b", weight)
    select(gm, [(group, KEPT)])
    gm.recompile()
    x = torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert edit.attribute(gm, group.readers[0].node).shape == (16, 4)
    assert relative_error(evaluate.run(gm, [x]), evaluate.run(twin, [x])) < 1e-12
