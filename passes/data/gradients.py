"""How much the model's predictions feel a change of a value: gradients of its log likelihood, and their second moments."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.sampling import generators, pick
from passes.base import Context
from passes.data.calibration import tokens_in
from passes.data.prefix import exact_copy
from passes.data.sweep import Sweep
from passes.learning.descent import some_rows
from passes.learning.divergence import some_of
from passes.memo.packed import like

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

    def found() -> list[Tensor]:
        sums, seen = total_gradients(gm, ctx, nodes, zeros, add, tokens, seed)
        return [(total / max(seen, 1)).float() for total in sums]

    made = ctx.memo.kept("sensitivities", found, like([total.float() for total in zeros()]))
    return dict(zip(at, made, strict=True))


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
    origin = {twin[node]: node for node in nodes}
    sweep = Sweep(exact, {node: node for node in origin})
    drawn = generators(seed, len(ctx.calibration))
    share = -(-tokens // len(ctx.calibration))

    def one(index: int, batch: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        *own, seen = sums
        rows = some_rows(batch, -(-share * len(batch[0]) // tokens_in(batch)), drawn[index])
        slope = partial(sampled_slope, sweep.outputs, drawn[index])
        for piece in sweep.pieces(rows):
            sweep.run(piece, slope, lambda node, value, gradient: take(own, origin[node], value, gradient))
        seen += tokens_in(rows)

    *sums, seen = ctx.total(lambda: [*zeros(), torch.zeros((), dtype=torch.int64)], one, "gradients")
    return sums, int(seen)


def sampled_slope(outputs: Mapping[Node, str], generator: torch.Generator, node: Node, value: Tensor) -> Tensor:
    """The gradient, at an own output, of the log likelihood of a sample of the model's own predictions.

    Of logits it is `[class drawn] − softmax`, a few rows at a time: the draws are the same however a batch is cut into pieces. Outputs that
    are no logits count as the means of normal distributions of variance one.
    """
    if outputs[node] != "logits":
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    rows = value.reshape(-1, value.shape[-1])
    slope = torch.empty_like(rows)
    for some in some_of(rows):
        p = rows[some].float().softmax(-1)
        drawn = pick(p, generator)
        slope[some] = p.neg_().scatter_add_(1, drawn, torch.ones_like(p[:, :1]))
    return slope.view(value.shape)
