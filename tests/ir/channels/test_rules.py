"""The law of channel groups, for every row of the rules: a map of a group that is not frozen keeps the function."""

import pytest
import torch

from ir import evaluate
from ir.capture import capture
from ir.channels import Map
from ir.verify import verify
from passes.pipeline import relative_error
from tests.ir.channels.samples import SAMPLES, graph
from tests.mapping import map_all


@pytest.fixture(scope="module")
def captured():
    made = {}

    def get(name):
        if name not in made:
            function, shapes = SAMPLES[name]
            made[name] = graph(function, **shapes)
        return made[name]

    return get


@pytest.mark.parametrize("name", SAMPLES)
def test_maps_of_free_groups_keep_the_function(captured, name):
    inputs = [torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]
    for kind in (Map.PERMUTE, Map.SCALE, Map.ROTATE, Map.LINEAR):
        gm = capture(captured(name))
        before = evaluate.run(gm, inputs)
        groups = map_all(gm, kind)
        verify(gm)
        assert relative_error(evaluate.run(gm, inputs), before) < 1e-9, [str(group) for group in groups]
