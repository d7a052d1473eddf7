import pytest
import torch

from ir.capture import capture
from ir.errors import GraphError
from ir.inference import check_shapes
from ir.match import aten, find
from tests.ir.channels.samples import sample


def test_graphs_record_what_their_calls_give():
    gm = capture(sample("grouped attention"))
    recorded = [node.meta["val"] for node in gm.graph.nodes if node.op != "output"]
    check_shapes(gm)
    assert all(value is node.meta["val"] for value, node in zip(recorded, gm.graph.nodes, strict=False))


def test_another_shape_is_a_fault():
    gm = capture(sample("relu"))
    (relu,) = find(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"][..., :8]
    with pytest.raises(GraphError, match=r"%relu is recorded as .*8.*, and gives .*16"):
        check_shapes(gm)


def test_numbers_that_do_not_fit_are_a_fault():
    gm = capture(sample("grouped attention"))
    reshape = next(node for node in find(gm, aten.reshape.default) if 8 in node.args[1] or 4 in node.args[1])
    reshape.args = (reshape.args[0], [7 if isinstance(size, int) and size > 0 else size for size in reshape.args[1]])
    with pytest.raises(GraphError, match="an error"):
        check_shapes(gm)


def test_dtypes_count():
    gm = capture(sample("relu"))
    (relu,) = find(gm, aten.relu.default)
    relu.meta["val"] = relu.meta["val"].to(torch.float32)
    with pytest.raises(GraphError, match="float32"):
        check_shapes(gm)
