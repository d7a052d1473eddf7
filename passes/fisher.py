"""What the model's Fisher information says of each linear: weights of tokens, and Kronecker factors. One run over all calibration data.

Gradients are of the log likelihood of a sample of the model's own predictions, whose second moments are the Hessian of KL(model ‖ changed
model); activations are not rounded.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.rounding import row_groups
from ir.sampling import generators
from passes.base import Context
from passes.gradients import backward
from passes.prefix import exact_copy

Take = Callable[[int, Sequence[Tensor], Node, Tensor, Tensor], None]


def token_weights(gm: GraphModule, ctx: Context, nodes: Collection[Node], groups: int) -> dict[Node, list[Tensor]]:
    """The mean squared gradient of the loss at each group of outputs, for each batch `[tokens, groups]` (GuidedQuant, 2505.07004).

    Batches of other processes have no tokens here.

    Memory: `4 groups` bytes for each token and linear, beside the activations of one batch.

    Args:
        nodes: linears.
        groups: of outputs, as `row_groups` makes them.
    """
    count = len(ctx.calibration)
    found = {node: [torch.empty(0, len(row_groups(edit.value(node).shape[-1], groups))) for _ in range(count)] for node in nodes}

    def take(index: int, _: Sequence[Tensor], node: Node, x: Tensor, g: Tensor) -> None:
        squares = g.flatten(0, -2).float().square()
        found[node][index] = torch.stack([squares[:, part].mean(1) for part in row_groups(squares.shape[1], groups)], 1)

    _run(gm, ctx, nodes, list, take)
    return found


@dataclass
class Kronecker:
    """Sums over tokens of `GGᵀ [N, N]` and `GᵀG [K, K]`, with gradients `G = g xᵀ [N, K]` of a weight, and the number of tokens."""

    outer: Tensor
    inner: Tensor
    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def take(self, x: Tensor, g: Tensor) -> None:
        """Take in a linear's inputs `[..., K]` and the gradients of its outputs `[..., N]`."""
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        self.tokens += len(x)
        self.outer.addmm_((g * x.square().sum(1, keepdim=True)).T, g)
        self.inner.addmm_((x * g.square().sum(1, keepdim=True)).T, x)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`H_out = E[GGᵀ]` and `H_in = E[GᵀG] / E‖G‖²`, so that `½ tr(H_out ΔW H_in ΔWᵀ)` are nats a token."""
        return self.outer / max(int(self.tokens), 1), self.inner / self.inner.trace().clamp_min(torch.finfo(torch.float32).tiny)


def kronecker_factors(gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> dict[Node, tuple[Tensor, Tensor]]:
    """The Kronecker pair of the Fisher information of each linear's weight, `H_out [N, N]` and `H_in [K, K]` (YAQA, 2505.22988).

    Where the paper's sketch B takes the gradient of a sequence as one, tokens count one by one: products of two tokens' gradients vary much
    more than they add on average, and few sequences are seen. So a divergence comes out too low, and its shape right. Memory: `N² + K²`
    floats a linear, beside one batch's activations.
    """
    sizes = {node: (edit.value(node).shape[-1], edit.value(node.args[0]).shape[-1]) for node in nodes}  # type: ignore[arg-type]

    def zeros() -> list[Tensor]:
        made = [Kronecker(torch.zeros(N, N), torch.zeros(K, K)) for N, K in sizes.values()]
        return [part for own in made for part in (own.outer, own.inner, own.tokens)]

    def by_node(sums: Sequence[Tensor]) -> dict[Node, Kronecker]:
        return {node: Kronecker(*sums[3 * place : 3 * place + 3]) for place, node in enumerate(sizes)}

    def take(_: int, sums: Sequence[Tensor], node: Node, x: Tensor, g: Tensor) -> None:
        by_node(sums)[node].take(x.float(), g.float())

    return {node: own.factors() for node, own in by_node(_run(gm, ctx, nodes, zeros, take)).items()}


def _run(gm: GraphModule, ctx: Context, nodes: Collection[Node], zeros: Callable[[], Sequence[Tensor]], take: Take) -> list[Tensor]:
    """Call `take` with the number of a batch, sums, and every linear of `nodes` with its input and the gradient of its output there."""
    exact, twin = exact_copy(gm)
    wanted = {twin[node]: node for node in nodes}
    sources = {node.args[0] for node in wanted}
    drawn = generators(ctx.seed, len(ctx.calibration))

    def one(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        read = evaluate.bind(exact, batch)

        def watch(node: Node, value: Any) -> None:
            if node in wanted:
                if not value.requires_grad:
                    value.requires_grad_()
                value.register_hook(partial(take, index, sums, wanted[node], read[node.args[0]]))  # type: ignore[index]
            if node in sources:
                read[node] = value.detach()

        backward(exact, batch, watch, drawn[index])

    return ctx.total(zeros, one, "gradients")
