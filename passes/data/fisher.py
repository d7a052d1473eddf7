"""What the model's Fisher information says of each linear: weights of tokens, and Kronecker factors. One run over all calibration data.

Gradients are of the log likelihood of a sample of the model's own predictions, whose second moments are the Hessian of KL(model ‖ changed
model); activations are not rounded.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ir import edit
from ir.rounding import row_groups
from ir.sampling import generators
from passes.base import Context
from passes.data.calibration import tokens_in
from passes.data.gradients import sampled_slope
from passes.data.prefix import exact_copy
from passes.data.sweep import Sweep, room_of
from passes.memo.packed import like

ROOM = 2**26  # bytes of factors that may be held at a time of any model
SHARE = 4  # of a greater one as many as its weights take, over this
COUNT = torch.empty((), dtype=torch.int64, device="meta")
Take = Callable[[int, Sequence[Tensor], Node, Tensor, Tensor], None]


def token_weights(gm: GraphModule, ctx: Context, nodes: Collection[Node], groups: int) -> dict[Node, list[Tensor]]:
    """The mean squared gradient of the loss at each group of outputs, for each batch `[tokens, groups]` (GuidedQuant, 2505.07004).

    Batches of other processes have no tokens here.

    Memory: `4 groups` bytes for each token and linear, beside the activations of some rows.

    Args:
        nodes: linears.
        groups: of outputs, as `row_groups` makes them.
    """
    parts = {node: row_groups(edit.value(node).shape[-1], groups) for node in nodes}
    found: dict[Node, list[list[Tensor]]] = {node: [[torch.empty(0, len(own))] for _ in ctx.calibration] for node, own in parts.items()}

    def take(index: int, _: Sequence[Tensor], node: Node, x: Tensor, g: Tensor) -> None:
        squares = g.flatten(0, -2).float().square()
        found[node][index].append(torch.stack([squares[:, part].mean(1) for part in parts[node]], 1))

    def all_found() -> list[Tensor]:
        _run(gm, ctx, nodes, list, take)
        return [torch.cat(pieces) for node in nodes for pieces in found[node]]

    own = set(ctx.ranks.share(len(ctx.calibration)))
    tokens = [tokens_in(batch) * (index in own) for index, batch in enumerate(ctx.calibration)]
    form = like([torch.empty(count, len(parts[node]), device="meta") for node in nodes for count in tokens])
    made = ctx.memo.kept("weights of tokens", all_found, form, own=True)
    weights = iter(made)
    return {node: [next(weights) for _ in ctx.calibration] for node in nodes}


@dataclass
class Kronecker:
    """Sums over tokens of `GGᵀ [N, N]` and `GᵀG [K, K]`, `G = g xᵀ [N, K]` the gradient of a weight; the number of tokens, int64 `[]`."""

    outer: Tensor
    inner: Tensor
    tokens: Tensor

    @classmethod
    def empty(cls, N: int, K: int) -> "Kronecker":
        """Of no tokens."""
        return cls(torch.zeros(N, N), torch.zeros(K, K), torch.zeros((), dtype=torch.int64))

    def take(self, x: Tensor, g: Tensor) -> None:
        """Take in a linear's inputs `[..., K]` and the gradients of its outputs `[..., N]`."""
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        self.tokens += len(x)
        self.outer.addmm_((g * x.square().sum(1, keepdim=True)).T, g)
        self.inner.addmm_((x * g.square().sum(1, keepdim=True)).T, x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`H_out = E[GGᵀ]` and `H_in = E[GᵀG] / E‖G‖²`, so that `½ tr(H_out ΔW H_in ΔWᵀ)` are nats a token."""
        return self.outer / max(int(self.tokens), 1), self.inner / self.inner.trace().clamp_min(torch.finfo(torch.float32).tiny)


def kronecker_factors(gm: GraphModule, ctx: Context, nodes: Collection[Node], name: str = "factors") -> dict[Node, tuple[Tensor, Tensor]]:
    """The Kronecker pair of the Fisher information of each linear's weight, `H_out [N, N]` and `H_in [K, K]` (YAQA, 2505.22988).

    Where the paper's sketch B takes the gradient of a sequence as one, tokens count one by one: products of two tokens' gradients vary much
    more than they add on average, and few sequences are seen. So a divergence comes out too low, and its shape right. Memory: `N² + K²`
    floats a linear, beside the activations of some rows; `Factors` bounds them.
    """
    sizes = {node: (edit.value(node).shape[-1], edit.value(node.all_input_nodes[0]).shape[-1]) for node in nodes}

    def zeros() -> list[Tensor]:
        made = [Kronecker.empty(N, K) for N, K in sizes.values()]
        return [part for own in made for part in (own.outer, own.inner, own.tokens)]

    def by_node(sums: Sequence[Tensor]) -> dict[Node, Kronecker]:
        return {node: Kronecker(*sums[3 * place : 3 * place + 3]) for place, node in enumerate(sizes)}

    def take(_: int, sums: Sequence[Tensor], node: Node, x: Tensor, g: Tensor) -> None:
        by_node(sums)[node].take(x.float(), g.float())

    shapes = [torch.empty(shape, device="meta") for N, K in sizes.values() for shape in ((N, N), (K, K))]
    kinds = [kind for outer, inner in zip(shapes[::2], shapes[1::2], strict=True) for kind in (outer, inner, COUNT)]
    found = ctx.memo.kept(name, lambda: _run(gm, ctx, nodes, zeros, take), like(kinds))
    sums = by_node(found)
    found.clear()
    return {node: sums.pop(node).factors() for node in nodes}


class Factors:
    """`kronecker_factors` of linears, found for as many at a time as fit beside the model: each is given once, and then forgotten.

    Memory: `ROOM` bytes of factors, or a quarter of the weights' bytes, or those of a single linear; and the weights as they were until the
    last factors are known. Each group of linears takes a run of its own over all calibration data, with the same draws.

    Args:
        nodes: linears, in the order that they will be asked for; the graph may be rounded between.
    """

    def __init__(self, gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> None:
        self.ctx, self.known = ctx, dict[Node, tuple[Tensor, Tensor]]()
        self.groups = dict(enumerate(_groups(nodes, room_of(gm, ROOM, SHARE))))
        self.gm, twin = exact_copy(gm)
        self.twin = {node: twin[node] for node in nodes}

    def take(self, node: Node) -> tuple[Tensor, Tensor]:
        """The pair of a linear."""
        if node not in self.known:
            number, group = next((number, group) for number, group in self.groups.items() if node in group)
            with self.ctx.memo.apart():  # whichever of the group is asked for first
                found = kronecker_factors(self.gm, self.ctx, [self.twin[member] for member in group], f"factors, part {number}")
            self.known.update((member, found[self.twin[member]]) for member in group)
            del self.groups[number]
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


def _run(gm: GraphModule, ctx: Context, nodes: Collection[Node], zeros: Callable[[], Sequence[Tensor]], take: Take) -> list[Tensor]:
    """Sums over batches: `take` gets a batch's number, sums, and every linear of `nodes` with its input and the gradient of its output."""
    exact, twin = exact_copy(gm)
    origin = {twin[node]: node for node in nodes}
    sweep = Sweep(exact, {node: node.all_input_nodes[0] for node in origin})
    drawn = generators(ctx.seed, len(ctx.calibration))

    def one(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        slope = partial(sampled_slope, sweep.outputs, drawn[index])
        for piece in sweep.pieces(batch):
            sweep.run(piece, slope, lambda node, x, g: take(index, sums, origin[node], x, g))

    return ctx.total(zeros, one, "gradients")
