"""What tests of passes share: tokens, small modules, contexts, and compiled models made once per session."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import passes
from ir import edit
from ir.sites import layers
from passes.base import Context, Record
from passes.compiled import Compiled
from passes.data.calibration import flat_batches
from passes.pipeline import Pipeline
from tests.families import VOCABULARY, load


def tokens(batch: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


CALIBRATION = [{"input_ids": tokens(seed=seed)} for seed in (1, 2)]


class Mlp(nn.Module):
    """Two linears over vectors, the first with a bias."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def vectors(seed: int = 0, rows: int = 8, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def context(gm: GraphModule, calibration=None) -> Context:
    """A context for `gm`, with its example as probe."""
    return Context(flat_batches(gm, calibration), gm.meta["example"], original=edit.copied(gm))


def run(gm: GraphModule, pipeline: object, calibration=None, ctx: Context | None = None) -> tuple[list[Record], Context]:
    """Run a pipeline on `gm`, in place."""
    ctx = ctx or context(gm, calibration)
    return Pipeline.of(pipeline).execute(gm, ctx), ctx  # type: ignore[arg-type]


def weights(gm: GraphModule) -> dict[str, Tensor]:
    """Every stored tensor by name."""
    return {str(node.target): edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}


def wide_share(gm: GraphModule, bits: int = 8) -> float:
    """The share of annotated weights with that many bits."""
    sizes = [(layer.site("weight").encoding, edit.value(layer.weight).numel()) for layer in layers(gm)]
    marked = [(encoding, size) for encoding, size in sizes if encoding is not None]
    return sum(size for encoding, size in marked if encoding.bits == bits) / sum(size for _, size in marked)


def same_weights(a: GraphModule, b: GraphModule) -> bool:
    """Whether two graphs store the same bits under the same names."""
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)


@cache
def compiled(family: str, pipeline: str, dtype: torch.dtype = torch.float32) -> Compiled:
    """A family compressed by a pipeline, made once: do not change it."""
    return passes.compile(load(family, dtype).captured, pipeline, CALIBRATION)
