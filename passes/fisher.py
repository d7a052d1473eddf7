"""What the model's Fisher information says of each linear: weights of tokens, and Kronecker factors. One run over all calibration data.

Gradients are of the log likelihood of a sample of the model's own predictions, whose second moments are the Hessian of KL(model ‖ changed
model); activations are not rounded.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ir import edit
from ir.rounding import row_groups
from passes.base import Context
from passes.gradients import sampled_slope
from passes.prefix import exact_copy
from passes.sweep import Sweep, room_of

ROOM = 2**26  # bytes of factors that may be held at a time of any model
SHARE = 2  # of a greater one as many as its weights take, over this


def token_weights(gm: GraphModule, ctx: Context, nodes: Collection[Node], groups: int) -> dict[Node, list[Tensor]]:
    """The mean squared gradient of the loss at each group of outputs, for each batch `[tokens, groups]` (GuidedQuant, 2505.07004).

    Memory: `4 groups` bytes for each token and linear, beside the activations of some rows.

    Args:
        nodes: linears.
        groups: of outputs, as `row_groups` makes them.
    """
    found: dict[Node, list[list[Tensor]]] = {node: [[] for _ in ctx.calibration] for node in nodes}

    def take(index: int, node: Node, x: Tensor, g: Tensor) -> None:
        squares = g.flatten(0, -2).float().square()
        found[node][index].append(torch.stack([squares[:, part].mean(1) for part in row_groups(squares.shape[1], groups)], 1))

    _run(gm, ctx, nodes, take)
    return {node: [torch.cat(pieces) for pieces in batches] for node, batches in found.items()}


@dataclass
class Kronecker:
    """Sums over tokens of `GGᵀ [N, N]` and `GᵀG [K, K]`, with gradients `G = g xᵀ [N, K]` of a weight, and the number of tokens."""

    outer: Tensor
    inner: Tensor
    tokens: int = 0

    def take(self, x: Tensor, g: Tensor) -> None:
        """Take in a linear's inputs `[..., K]` and the gradients of its outputs `[..., N]`."""
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        self.tokens += len(x)
        self.outer.addmm_((g * x.square().sum(1, keepdim=True)).T, g)
        self.inner.addmm_((x * g.square().sum(1, keepdim=True)).T, x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`H_out = E[GGᵀ]` and `H_in = E[GᵀG] / E‖G‖²`, so that `½ tr(H_out ΔW H_in ΔWᵀ)` are nats a token."""
        return self.outer / max(self.tokens, 1), self.inner / self.inner.trace().clamp_min(torch.finfo(torch.float32).tiny)


def kronecker_factors(gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> dict[Node, tuple[Tensor, Tensor]]:
    """The Kronecker pair of the Fisher information of each linear's weight, `H_out [N, N]` and `H_in [K, K]` (YAQA, 2505.22988).

    Where the paper's sketch B takes the gradient of a sequence as one, tokens count one by one: products of two tokens' gradients vary much
    more than they add on average, and few sequences are seen. So a divergence comes out too low, and its shape right. Memory: `N² + K²`
    floats a linear, beside the activations of some rows; `Factors` bounds them.
    """
    sums: dict[Node, Kronecker] = {}

    def take(_: int, node: Node, x: Tensor, g: Tensor) -> None:
        N, K = g.shape[-1], x.shape[-1]
        sums.setdefault(node, Kronecker(torch.zeros(N, N), torch.zeros(K, K))).take(x.float(), g.float())

    _run(gm, ctx, nodes, take)
    return {node: sums.pop(node).factors() for node in nodes}


class Factors:
    """`kronecker_factors` of linears, found for as many at a time as fit beside the model: each is given once, and then forgotten.

    Memory: `ROOM` bytes of factors, or half of the weights' bytes, or those of a single linear; and the weights as they were until the last
    factors are known. Each group of linears takes a run of its own over all calibration data, with the same draws.

    Args:
        nodes: linears, in the order that they will be asked for; the graph may be rounded between.
    """

    def __init__(self, gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> None:
        self.ctx, self.known = ctx, dict[Node, tuple[Tensor, Tensor]]()
        self.groups = _groups(nodes, room_of(gm, ROOM, SHARE))
        self.gm, twin = exact_copy(gm)
        self.twin = {node: twin[node] for node in nodes}

    def take(self, node: Node) -> tuple[Tensor, Tensor]:
        """The pair of a linear."""
        if node not in self.known:
            (group,) = (group for group in self.groups if node in group)
            found = kronecker_factors(self.gm, self.ctx, [self.twin[member] for member in group])
            self.known.update((member, found[self.twin[member]]) for member in group)
            self.groups.remove(group)
            if not self.groups:
                self.gm, self.twin = GraphModule(torch.nn.Module(), Graph()), {}
        return self.known.pop(node)


def _groups(nodes: Collection[Node], room: int) -> list[list[Node]]:
    """Linears in order, whose factors have room together."""
    groups: list[list[Node]] = []
    left = 0
    for node in nodes:
        size = 4 * sum(edit.value(side).shape[-1] ** 2 for side in (node, node.all_input_nodes[0]))
        if not groups or size > left:
            groups.append([])
            left = room
        groups[-1].append(node)
        left -= size
    return groups


def _run(gm: GraphModule, ctx: Context, nodes: Collection[Node], take: Callable[[int, Node, Tensor, Tensor], None]) -> None:
    """Call `take` with the number of the batch, every linear of `nodes`, its input and the gradient of its output, piece by piece."""
    exact, twin = exact_copy(gm)
    origin = {twin[node]: node for node in nodes}
    sweep = Sweep(exact, {node: node.all_input_nodes[0] for node in origin})
    slope = partial(sampled_slope, sweep.outputs, torch.Generator().manual_seed(ctx.seed))

    def give(index: int, node: Node, x: Tensor, g: Tensor) -> None:
        take(index, origin[node], x, g)

    for index, batch in enumerate(ctx.track(ctx.calibration, "gradients")):
        for piece in sweep.pieces(batch):
            sweep.run(piece, slope, partial(give, index))
