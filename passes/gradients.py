"""How much the model's predictions feel a change of a value: gradients of its log likelihood, and their second moments."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.sampling import draw, generators
from passes.base import Context
from passes.calibration import tokens_in
from passes.descent import some_rows
from passes.divergence import own_outputs
from passes.prefix import exact_copy

Take = Callable[[Sequence[Tensor], Node, Tensor, Tensor], None]


def output_sensitivity(gm: GraphModule, ctx: Context, nodes: Collection[Node], tokens: int, seed: int = 0) -> dict[Node, Tensor]:
    """`E[g²]` per channel `[N]` of what each of `nodes` gives, `g` the gradient of a sampled log likelihood, per token.

    This is the diagonal of the Fisher information, the Hessian of KL(model ‖ changed model): a change `δ` of a layer's output costs
    about `½ Σ_n E[g_n²] E[δ_n²]` nats a token. Classes are drawn from the model's own predictions; outputs that are no logits count as the
    means of normal distributions of variance one.

    Args:
        nodes: linears.
        tokens: of the calibration data, spread over all batches.
        seed: of what is drawn.
    """
    at = {node: place for place, node in enumerate(nodes)}

    def zeros() -> list[Tensor]:
        return [torch.zeros(edit.value(node).shape[-1], dtype=torch.float64) for node in at]

    def add(sums: Sequence[Tensor], node: Node, _: Tensor, gradient: Tensor) -> None:
        sums[at[node]].add_(gradient.flatten(0, -2).double().square().sum(0))

    sums, seen = total_gradients(gm, ctx, nodes, zeros, add, tokens, seed)
    return {node: (total / max(seen, 1)).float() for node, total in zip(at, sums, strict=True)}


def total_gradients(
    gm: GraphModule, ctx: Context, nodes: Collection[Node], zeros: Callable[[], Sequence[Tensor]], take: Take, tokens: int, seed: int = 0
) -> tuple[list[Tensor], int]:
    """Sums over batches of what each of `nodes`, its value and the gradient there of a sampled log likelihood say; and the tokens seen.

    Gradients are those of the graph with activations in floating point, rounded already or not.

    Args:
        nodes: calls.
        zeros: makes the sums of nothing.
        take: adds what a node, its value and its gradient on a batch have to sums.
        tokens: of the calibration data, spread over all batches.
        seed: of what is drawn.
    """
    exact, twin = exact_copy(gm)
    wanted = {twin[node]: node for node in nodes}
    drawn = generators(seed, len(ctx.calibration))
    share = -(-tokens // len(ctx.calibration))

    def one(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        *own, seen = sums

        def watch(node: Node, value: Any) -> None:
            if node in wanted:
                if not value.requires_grad:
                    value.requires_grad_()
                value.register_hook(partial(take, own, wanted[node], value.detach()))

        rows = some_rows(batch, -(-share * len(batch[0]) // tokens_in(batch)), drawn[index])
        backward(exact, rows, watch, drawn[index])
        seen += tokens_in(rows)

    *sums, seen = ctx.total(lambda: [*zeros(), torch.zeros((), dtype=torch.int64)], one, "gradients")
    return sums, int(seen)


def backward(gm: GraphModule, batch: Sequence[Tensor], watch: evaluate.Tap, generator: torch.Generator) -> None:
    """One run of a batch and back, from the log likelihood of a sample of the model's own predictions.

    `watch` is called with every node and its value, and lets the value require gradients and hooks it where it wants these.
    """
    outputs = own_outputs(gm)
    calls = evaluate.calls_for(gm, outputs)
    found = evaluate.evaluate(gm, calls, evaluate.bind(gm, batch), list(outputs), watch, grad=True)
    _log_likelihood(found, outputs, generator).backward()  # type: ignore[no-untyped-call]


def _log_likelihood(found: Mapping[Node, Tensor], outputs: Mapping[Node, str], generator: torch.Generator) -> Tensor:
    """Of a sample of the model's own predictions."""
    parts = []
    for node, name in outputs.items():
        value = found[node].float()
        if name == "logits":
            rows = value.flatten(0, -2).log_softmax(-1)
            parts.append(rows.gather(1, draw(rows.detach(), generator)).sum())
        else:
            parts.append((value * torch.randn(value.shape, generator=generator)).sum())
    return torch.stack(parts).sum()
