import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ir.channels.shapes import fixed_factor, in_order, label_shape
from tests.ir.graphs import traced


def test_symbolic_sizes_keep_the_number_that_divides_them():
    gm = traced(lambda x: x.reshape(-1, 8).repeat(6, 1), torch.randn(2, 3, 16))
    shapes = {str(node.target): label_shape(node.meta["val"]) for node in gm.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert shapes["aten.reshape.default"] == (2, 8)
    assert shapes["aten.repeat.default"] == (12, 8)


def test_reshapes_that_keep_what_varies_outside():
    env = ShapeEnv()
    s, t = (env.create_unbacked_symint() for _ in range(2))
    torch._check(s >= 2)
    torch._check(t >= 2)
    assert fixed_factor(4 * s) == 4
    assert fixed_factor(4 * s + 8) == 4
    assert fixed_factor(s + 3) == 1
    assert in_order([s, t, 16], [s, t, 4, 4])
    assert in_order([s, t, 4, 4], [s * t, 16])
    assert in_order([s, 4, t, 2], [4 * s, t, 2])
    assert not in_order([4, s, 2], [s, 4, 2])
    assert not in_order([4, s], [4 * s])
    assert not in_order([s, 16, t], [s, t, 16])
    assert in_order([s, 1, t], [s, t, 1])
