import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from backends.triton_gpu.fuse import fuse
from ir.canonical import canonicalize
from ir.capture import capture
from ir.match import find
from ir.ops import HADAMARD, hadamard
from tests.backends.onnx_qdq.conftest import quantized

ROWS = torch.ops.fxpress


class Block(nn.Module):
    """A norm and a rotation, each before a linear; with `shared`, their results are returned too."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.shared = nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 96), nn.Linear(96, 64), shared

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(x)
        rotated = hadamard(self.up(normed), 32)
        y = self.down(rotated)
        return (y, normed, rotated) if self.shared else (y,)


def lowered(shared: bool) -> tuple[GraphModule, GraphModule]:
    gm = capture(Block(shared), args=(torch.randn(2, 3, 64),))
    canonicalize(gm)
    quantized(gm, {"Linear": ("i8[1,-1]", "u8[1,-1]dynamic")})
    return gm, fuse(gm, [])[0]


def calls(gm: GraphModule) -> list[int]:
    counted = (ROWS.norm_quantize_rows.default, ROWS.hadamard_quantize_rows.default, ROWS.quantize_rows.default, HADAMARD)
    return [len(find(gm, target)) for target in (*counted, torch.ops.aten.rms_norm.default)]


@pytest.mark.parametrize(("shared", "expected"), [(False, [1, 1, 0, 0, 0]), (True, [0, 0, 2, 1, 1])])
def test_norms_and_rotations_go_into_the_rounding_unless_others_read_them(shared: bool, expected: list[int]) -> None:
    gm, fused = lowered(shared)
    assert calls(fused) == expected
    x = torch.randn(3, 5, 64)
    for ours, oracle in zip(fused(x), gm(x), strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-5)
