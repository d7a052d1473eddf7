"""How far a changed model is from the model as it was: what passes that learn minimise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.signature import Signature


def own_outputs(gm: GraphModule) -> dict[Node, str]:
    """The floating-point outputs that the model computes and that are its own, no cache, and their names."""
    signature: Signature | None = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    computed = [node.op == "call_function" and edit.value(node).is_floating_point() for node in nodes]
    if signature is None:
        return {node: "" for node, own in zip(nodes, computed, strict=True) if own}
    return {node: port.name for node, port, own in zip(nodes, signature.outputs, computed, strict=True) if own and not port.cached}


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
