"""`center_norm`: fold the mean subtraction of layer norms into what writes their inputs, which leaves RMS norms."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from ir import edit
from ir.channels import ChannelGroup, Map, channel_groups
from ir.match import aten, operand
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class CenterNorm(Pass):
    """Fold the mean subtraction of layer norms into what writes their inputs.

    Before::

        %2 = aten.add(%1, aten.linear(%x, %w)); %3 = aten.layer_norm(%2, [64], %g, None, 1e-05)

    After::

        %2 = aten.add(%1, aten.linear(%x, %w_centered)); %3 = aten.rms_norm(%2, [64], %g, 1e-05)

    Law: a layer norm is an RMS norm of `C x` with `C = I − 11ᵀ/n`, and `C C = C`. If every tensor that adds to `x` is replaced by `C` of
    it, `C x = x`. Computed in float64, stored in the weight's dtype. An RMS norm without a gain commutes with rotations, a layer norm does
    not.

    Limits: 1. only layer norms read the channels, no linear reads them bare; 2. the norms have no bias (`fold_norm` folds it). What was
    left is noted, with the reason.
    """

    effect: ClassVar[Effect] = Effect.PRESERVE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Center every group of channels that layer norms alone read; returns the number of norms changed."""
        changed = 0
        for group in channel_groups(gm, Map.CENTER):
            norms = [member.node for member in group.readers if member.node.target is aten.layer_norm.default]
            if not norms:
                continue
            reason = group.reason or _refusal(group, norms)
            if reason:
                ctx.notes.append(f"center_norm: kept the layer norm of {_place(norms)}: {reason}")
                continue
            for member in group.writers:
                weight = edit.attribute(gm, member.node).double()
                centered = weight - weight.mean(member.axis, keepdim=True)
                edit.set_attribute(gm, member.node, centered.to(edit.value(member.node).dtype))
            for norm in norms:
                _to_rms(gm, norm)
            changed += len(norms)
        return changed


def _place(norms: list[Node]) -> str:
    others = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    return (edit.module_path(norms[0]) or norms[0].name) + others


def _refusal(group: ChannelGroup, norms: list[Node]) -> str:
    if not group.writers:
        return "no stored tensor makes its channels"
    if any(isinstance(operand(norm, "bias"), Node) for norm in norms):
        return "a norm has a bias (run fold_norm first)"
    if any((member.channels < 0).any() for member in group.members) or group.blocks != 1:
        return "the norms run over more than these channels"
    return ""


def _to_rms(gm: GraphModule, norm: Node) -> None:
    x, shape, gain, eps = (operand(norm, name) for name in ("input", "normalized_shape", "weight", "eps"))
    edit.replace(norm, edit.emit(gm, aten.rms_norm.default, (x, shape, gain, eps), before=norm))
