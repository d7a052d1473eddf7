"""What the model's Fisher information says of each linear: weights of tokens, and Kronecker factors. One run over all calibration data.

Gradients are of the log likelihood of a sample of the model's own predictions, whose second moments are the Hessian of KL(model ‖ changed
model); activations are not rounded.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.rounding import row_groups
from passes.base import Context
from passes.calibration import tokens_in
from passes.gradients import backward
from passes.packed import like
from passes.prefix import exact_copy

Take = Callable[[Node, Tensor, Tensor], None]


def token_weights(gm: GraphModule, ctx: Context, nodes: Collection[Node], groups: int) -> dict[Node, list[Tensor]]:
    """The mean squared gradient of the loss at each group of outputs, for each batch `[tokens, groups]` (GuidedQuant, 2505.07004).

    Memory: `4 groups` bytes for each token and linear, beside the activations of one batch.

    Args:
        nodes: linears.
        groups: of outputs, as `row_groups` makes them.
    """
    found: dict[Node, list[Tensor]] = {node: [] for node in nodes}

    def take(node: Node, x: Tensor, g: Tensor) -> None:
        squares = g.flatten(0, -2).float().square()
        found[node].append(torch.stack([squares[:, part].mean(1) for part in row_groups(squares.shape[1], groups)], 1))

    def all_found() -> list[Tensor]:
        _run(gm, ctx, nodes, take)
        return [weights for node in nodes for weights in found[node]]

    parts = {node: len(row_groups(edit.value(node).shape[-1], groups)) for node in nodes}
    form = like([torch.empty(tokens_in(batch), parts[node], device="meta") for node in nodes for batch in ctx.calibration])
    made = ctx.memo.kept("weights of tokens", all_found, form)
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


def kronecker_factors(gm: GraphModule, ctx: Context, nodes: Collection[Node]) -> dict[Node, tuple[Tensor, Tensor]]:
    """The Kronecker pair of the Fisher information of each linear's weight, `H_out [N, N]` and `H_in [K, K]` (YAQA, 2505.22988).

    Where the paper's sketch B takes the gradient of a sequence as one, tokens count one by one: products of two tokens' gradients vary much
    more than they add on average, and few sequences are seen. So a divergence comes out too low, and its shape right. Memory: `N² + K²`
    floats a linear, beside one batch's activations.
    """
    sums = {node: Kronecker.empty(edit.value(node).shape[-1], edit.value(node.all_input_nodes[0]).shape[-1]) for node in nodes}

    def take(node: Node, x: Tensor, g: Tensor) -> None:
        sums[node].take(x.float(), g.float())

    parts = [part for own in sums.values() for part in (own.outer, own.inner, own.tokens)]
    ctx.memo.filled("factors", parts, lambda: _run(gm, ctx, nodes, take))
    return {node: sums[node].factors() for node in nodes}


def _run(gm: GraphModule, ctx: Context, nodes: Collection[Node], take: Take) -> None:
    """Call `take` with every linear of `nodes`, its input and the gradient of its output, batch by batch."""
    exact, twin = exact_copy(gm)
    wanted = {twin[node]: node for node in nodes}
    generator = torch.Generator().manual_seed(ctx.seed)
    for batch in ctx.track(ctx.calibration, "gradients"):
        read = evaluate.bind(exact, batch)
        sources = {node.args[0] for node in wanted}

        def watch(node: Node, value: Any, read: evaluate.Environment = read, sources: Collection[Any] = sources) -> None:
            if node in wanted:
                if not value.requires_grad:
                    value.requires_grad_()
                value.register_hook(partial(take, wanted[node], read[node.args[0]]))  # type: ignore[index]
            if node in sources:
                read[node] = value.detach()

        backward(exact, batch, watch, generator)
