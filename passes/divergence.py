"""How far a changed model is from the model as it was: what passes that learn minimise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate
from ir.signature import Signature
from passes.calibration import without_past


def own_outputs(gm: GraphModule) -> dict[Node, str]:
    """The floating-point outputs that the model computes and that are its own, no cache, and their names."""
    signature: Signature | None = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    computed = [node.op == "call_function" and edit.value(node).is_floating_point() for node in nodes]
    if signature is None:
        return {node: "" for node, own in zip(nodes, computed, strict=True) if own}
    return {node: port.name for node, port, own in zip(nodes, signature.outputs, computed, strict=True) if own and not port.cached}


def teacher(gm: GraphModule) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What gives a graph's own outputs for rows of a batch, which may be those of a graph that keeps other heads in its cache."""
    outputs = own_outputs(gm)
    calls, signature = evaluate.calls_for(gm, outputs), gm.meta.get("signature")

    def run(rows: Sequence[Tensor]) -> list[Tensor]:
        given = rows if signature is None else without_past(signature, rows)
        found = evaluate.evaluate(gm, calls, evaluate.bind(gm, given), list(outputs))
        return [found[node] for node in outputs]

    return run


def of_outputs(found: Mapping[Node, Any], exact: Mapping[Node, Any], outputs: Mapping[Node, str]) -> Tensor:
    """The sum over outputs: of logits `divergence`, of others `distance`."""
    return torch.stack([(divergence if name == "logits" else distance)(found[node], exact[node]) for node, name in outputs.items()]).sum()


def divergence(found: Tensor, exact: Tensor) -> Tensor:
    """KL(exact ‖ found) of logits `[..., tokens, classes]`, per token, in nats."""
    p, q = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """‖found − exact‖² / ‖exact‖²."""
    return (found - exact).square().sum() / exact.square().sum().clamp_min(1e-12)
