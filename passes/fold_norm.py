"""`fold_norm`: move the gains and biases of norms into the linears that read them."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.match import NORMS, find, operands
from ir.sites import Layer, layers
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold a norm's gain `g` and bias `c` into every linear that reads it.

    Before::

        %1 = aten.rms_norm(%x, [64], %g, 1e-06); %2 = aten.linear(%1, %w)

    After::

        %1 = aten.rms_norm(%x, [64], None, 1e-06); %2 = aten.linear(%1, %w_diag_g)

    Law: `(x̂ ⊙ g + c) Wᵀ + b = x̂ (W diag(g))ᵀ + (W c + b)`, computed in float64, stored in the weight's dtype.

    Limits: 1. every reader of the norm is a linear; 2. no other layer reads those weights (run `untie` first); 3. weights are not quantized
    yet. A norm that cannot be folded is kept, with a note.
    """

    effect: ClassVar[Effect] = Effect.PRESERVE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Fold every norm whose readers allow it."""
        by_node = {layer.node: layer for layer in layers(gm)}
        uses: dict[int, int] = {}
        for layer in by_node.values():
            key = id(edit.attribute(gm, layer.weight)) if layer.weight.op == "get_attr" else 0
            uses[key] = uses.get(key, 0) + 1
        changed = 0
        for node in find(gm, *NORMS):
            if not isinstance(operands(node)["weight"], Node):
                continue
            readers = [by_node.get(user) for user in node.users]
            reason = _refusal(gm, node, readers, uses)
            if reason:
                ctx.notes.append(f"fold_norm: kept the norm of {edit.module_path(node) or node.name}: {reason}")
                continue
            _fold(gm, node, [reader for reader in readers if reader is not None])
            changed += 1
        return changed


def _refusal(gm: GraphModule, node: Node, readers: list[Layer | None], uses: dict[int, int]) -> str:
    if any(reader is None or reader.kind != "Linear" or reader.node.args[0] is not node for reader in readers):
        return "not only linears read it"
    if any(reader is not None and reader.weight.op != "get_attr" for reader in readers):
        return "the weight of a reader is quantized already"
    if any(reader is not None and uses[id(edit.attribute(gm, reader.weight))] > 1 for reader in readers):
        return "a reader's weight is shared with another layer (run untie first)"
    if any(reader is not None and set(reader.weight.users) != {reader.node} for reader in readers):
        return "a reader's weight is read by something else than a layer"
    return ""


def _fold(gm: GraphModule, norm: Node, readers: list[Layer]) -> None:
    gain_node, bias_node = operands(norm)["weight"], operands(norm).get("bias")
    gain = edit.attribute(gm, gain_node).double()
    for reader in readers:
        weight = edit.attribute(gm, reader.weight)
        if isinstance(bias_node, Node):
            _fold_bias(gm, reader, weight, edit.attribute(gm, bias_node).double())
        edit.set_attribute(gm, reader.weight, (weight.double() * gain).to(weight.dtype))
    for name, given in (("weight", gain_node), ("bias", bias_node)):
        if isinstance(given, Node):
            edit.set_operand(norm, name, None)


def _fold_bias(gm: GraphModule, reader: Layer, weight: Tensor, shift: Tensor) -> None:
    moved, dtype = weight.double() @ shift, weight.dtype
    bias_node = operands(reader.node)["bias"]
    if isinstance(bias_node, Node):
        bias = edit.attribute(gm, bias_node)
        moved, dtype = bias.double() + moved, bias.dtype
    new = edit.add_attribute(gm, f"{reader.path}.bias", moved.to(dtype), before=reader.node)
    reader.node.args = (*reader.node.args[:2], new)
