"""How far a changed model is from the model as it was: what passes that learn minimise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.signature import Signature


def own_outputs(gm: GraphModule) -> dict[Node, str]:
    """The floating-point outputs that are the model's own, no cache, and their names."""
    signature: Signature | None = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    if signature is None:
        return {node: "" for node in nodes if edit.value(node).is_floating_point()}
    found = zip(nodes, signature.outputs, strict=True)
    return {node: port.name for node, port in found if not port.cached and edit.value(node).is_floating_point()}


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
