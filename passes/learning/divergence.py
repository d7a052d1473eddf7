"""How far a changed model is from the model as it was: what passes that learn minimise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.signature import Signature
from passes.data.calibration import without_past

TOGETHER = 2**18  # logits: a megabyte of each of a few tensors


def own_outputs(gm: GraphModule) -> dict[Node, str]:
    """The floating-point outputs that the model computes and that are its own, no cache, and their names."""
    signature: Signature | None = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    computed = [node.op == "call_function" and edit.value(node).is_floating_point() for node in nodes]
    if signature is None:
        return {node: "" for node, own in zip(nodes, computed, strict=True) if own}
    return {node: port.name for node, port, own in zip(nodes, signature.outputs, computed, strict=True) if own and not port.cached}


def teacher(gm: GraphModule, labels: float = 0.0) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What gives a graph's own outputs for rows of a batch, which may be those of a graph that keeps other heads in its cache.

    Args:
        labels: the share of its predictions that the text's next tokens take over.
    """
    outputs = own_outputs(gm)
    calls, signature = evaluate.calls_for(gm, outputs), gm.meta.get("signature")

    def run(rows: Sequence[Tensor]) -> list[Tensor]:
        given = rows if signature is None else without_past(signature, rows)
        found = evaluate.evaluate(gm, calls, evaluate.bind(gm, given), list(outputs))
        if signature is None or not labels:
            return [found[node] for node in outputs]
        named = {port.name: value for port, value in zip(signature.inputs, rows, strict=True)}
        texts = named["input_ids"], named.get("attention_mask")
        return [corrected(found[node], *texts, labels) if name == "logits" else found[node] for node, name in outputs.items()]

    return run


def corrected(logits: Tensor, ids: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """Logits of `(1 − share) p + share [next token]`; the last token, and those that are masked or come before such, have `p`.

    Args:
        logits: of `p`, `[rows, tokens, classes]`.
        ids: int64 `[rows, tokens]`.
        mask: `[rows, past + tokens]`, 0 for tokens that are not there; None if all are.
        share: of the text, 0 to 1.
    """
    p = logits.float().softmax(-1)
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -ids.shape[1] :].bool()
    said = share * (there[:, :-1] & there[:, 1:])[..., None].to(p.dtype)
    p[:, :-1].mul_(1 - said).scatter_add_(-1, ids[:, 1:, None], said)
    return p.clamp_min_(torch.finfo(p.dtype).tiny).log_()


def of_outputs(found: Mapping[Node, Any], exact: Mapping[Node, Any], outputs: Mapping[Node, str]) -> Tensor:
    """The sum over outputs: of logits `divergence`, of others `distance`."""
    return torch.stack([(divergence if name == "logits" else distance)(found[node], exact[node]) for node, name in outputs.items()]).sum()


def divergence(found: Tensor, exact: Tensor) -> Tensor:
    """KL(exact ‖ found) of logits `[..., tokens, classes]`, per token, in nats; gradients go to `found`.

    A few rows at a time: beside both there is at most the gradient, one tensor of their size, which is found on the way there.
    """
    result: Tensor = _Divergence.apply(found, exact, found.requires_grad and torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    """The mean over rows of KL(exact ‖ found), whose gradient is `(softmax(found) − softmax(exact)) / rows`."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, exact: Tensor, sloped: bool) -> Tensor:
        ctx.shape = found.shape
        found, exact = (logits.reshape(-1, found.shape[-1]) for logits in (found, exact))
        slope, total = torch.empty_like(found) if sloped else None, torch.zeros((), device=found.device)
        for rows in some_of(found):
            p, q = exact[rows].float().log_softmax(-1), found[rows].float().log_softmax(-1)
            weights = p.exp()
            total += (p.sub_(q) * weights).sum()
            if slope is not None:
                slope[rows] = q.exp_().sub_(weights).div_(len(found))
        ctx.save_for_backward(slope)
        return total / len(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,), (outer,) = ctx.saved_tensors, gradients
        return (slope if outer == 1 else slope * outer).view(ctx.shape), None, None


def some_of(rows: Tensor) -> list[slice]:
    """Which of `rows [rows, classes]` are looked at together, so that what is computed of them stays small."""
    step = max(TOGETHER // rows.shape[1], 1)
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """‖found − exact‖² / ‖exact‖²."""
    return (found - exact).square().sum() / exact.square().sum().clamp_min(1e-12)
