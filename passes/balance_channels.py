"""`balance_channels`: the non-diagonal transform in closed form that makes activations and weights equally easy to round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate, hadamard, maps
from ir.block_transform import balanced
from ir.channels import ChannelGroup, Map, channel_groups
from ir.errors import DataError, OptionError
from ir.match import aten
from ir.online import online_inputs
from ir.ops import HADAMARD
from ir.sites import Layer, heads, readers
from passes.base import Context, Effect, Pass

Grams = dict[Node, Tensor]


@dataclass(frozen=True)
class BalanceChannels(Pass):
    """Mix channels within blocks, so that activations and the weights that read them have the same second moments.

    Before::

        %2 = aten.linear(%1, %v); ... %9 = aten.linear(%8, %o)

    After::

        %2 = aten.linear(%1, %v_mixed); ... %9 = aten.linear(%8, %o_mixed)

    Law: `(x Tᵀ)(W T⁻¹)ᵀ = x Wᵀ` for invertible `T`. Per block, with `XᵀX = L_x L_xᵀ`, `WᵀW = L_w L_wᵀ` and the singular values
    `L_wᵀ L_x = U S Vᵀ`, `T = S^(−½) Uᵀ L_wᵀ` (2512.00956), followed by a Hadamard matrix where its order has one: both sides then have the
    second moments `H S Hᵀ`, which no other choice of T makes smaller together.

    Values of attention tolerate any linear map within a head, folded into weights. With `online`, so do inputs that come out of a
    nonlinearity, by a product with blocks of `block` channels and a Hadamard operator over all of them, before the linears that read them.

    Limits: 1. weights are not quantized yet; 2. heads are balanced whole, whatever `block`. Where a recipe has annotated layers, only these
    are looked at.

    Args:
        online: balance the inputs of nonlinearities too, at run time.
        block: channels of an online block.
        tokens: of the calibration data to take second moments from.

    Raises:
        DataError: no calibration data.
    """

    online: bool = False
    block: int = 32
    tokens: int = 16384
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        if self.block < 2 or self.tokens < 1:
            raise OptionError("a block has two channels or more, tokens are at least 1", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data."""
        if not ctx.calibration:
            raise DataError("balance_channels needs calibration data", remedy="pass calibration=[{'input_ids': ids}, ...]")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Balance heads, then inputs; returns how many groups and inputs."""
        sources = {layer.weight: (source, layer) for source, found in readers(gm).items() for layer in found}
        counted = _counted(gm)
        groups = [
            group
            for group in channel_groups(gm, Map.LINEAR)
            if not group.reason and group.writers and any(member.node in counted for member in group.readers)
        ]
        inputs = self._online_inputs(gm, ctx) if self.online else {}
        read = [sources[member.node][0] for group in groups for member in group.readers if member.node in sources]
        grams = self._grams(gm, ctx, [*read, *inputs])
        for group in ctx.track(groups, "balance"):
            maps.apply(gm, group, _head_maps(gm, group, {node: grams[sources[node][0]] for node in counted if sources[node][0] in grams}))
        for source, found in inputs.items():
            self._insert(gm, source, found, grams[source])
        return len(groups) + len(inputs)

    def _online_inputs(self, gm: GraphModule, ctx: Context) -> dict[Node, list[Layer]]:
        found = {}
        for source, layers in online_inputs(gm, channel_groups(gm, Map.ROTATE)).items():
            if edit.value(source).shape[-1] % self.block:
                reason = f"blocks of {self.block} do not divide {edit.value(source).shape[-1]} channels"
                ctx.notes.append(f"balance_channels: left out {layers[0].path}: {reason}")
            else:
                found[source] = layers
        return found

    def _grams(self, gm: GraphModule, ctx: Context, sources: Sequence[Node]) -> Grams:
        """`XᵀX` of every tensor, float64."""
        grams = {source: torch.zeros((edit.value(source).shape[-1],) * 2, dtype=torch.float64) for source in sources}
        share = -(-self.tokens // len(ctx.calibration))

        def tap(node: Node, value: Any) -> None:
            if node in grams:
                rows = value.flatten(0, -2)
                rows = rows[torch.linspace(0, len(rows) - 1, min(share, len(rows))).long()].float()
                grams[node] += rows.T @ rows

        for batch in ctx.track(ctx.calibration, "second moments"):
            evaluate.run(gm, batch, tap)
        return grams

    def _insert(self, gm: GraphModule, source: Node, found: list[Layer], gram: Tensor) -> None:
        """A product with blocks before the linears that read `source`, its inverse in their weights."""
        weights = [edit.attribute(gm, layer.weight).detach().double() for layer in found]
        T = balanced(gram, torch.stack([W.T @ W for W in weights]).sum(0), self.block)
        first, value = min(layer.node for layer in found), edit.value(source)
        matrices = edit.add_attribute(gm, f"{found[0].path}.balance", T.mT.contiguous().to(value.dtype), before=first)
        sizes: list[Any] = [edit.emit(gm, aten.sym_size.int, (source, axis), before=first) for axis in range(value.ndim - 1)]
        rows = edit.emit(gm, aten.reshape.default, (source, [-1, len(T), self.block]), before=first)
        turned = edit.emit(gm, aten.transpose.int, (rows, 0, 1), before=first)
        mixed = edit.emit(gm, aten.bmm.default, (turned, matrices), before=first)
        back = edit.emit(gm, aten.transpose.int, (mixed, 0, 1), before=first)
        result = edit.emit(gm, aten.reshape.default, (back, [*sizes, value.shape[-1]]), before=first)
        order = hadamard.largest_block(value.shape[-1])
        spread = edit.emit(gm, HADAMARD, (result, order), before=first)
        inverse = torch.linalg.inv(T)
        for layer, W in zip(found, weights, strict=True):
            split = W.reshape(len(W), len(T), self.block).transpose(0, 1) @ inverse
            rotated = hadamard.transform(split.transpose(0, 1).reshape(W.shape), order)
            edit.set_attribute(gm, layer.weight, rotated.to(edit.value(layer.weight).dtype))
            layer.site("input").read(spread)


def _counted(gm: GraphModule) -> set[Node]:
    """The weights of the layers that a recipe quantizes: annotated ones if there are any, else all but output heads."""
    found = [layer for group in readers(gm).values() for layer in group]
    annotated = any(layer.site("weight").encoding for layer in found)
    outputs = heads(gm)
    return {layer.weight for layer in found if (layer.site("weight").encoding if annotated else layer.node not in outputs)}


def _head_maps(gm: GraphModule, group: ChannelGroup, grams: Grams) -> Tensor:
    """`H T` of every block of a group; heads that share their values count together."""
    shape = (group.blocks, group.block, group.block)
    both = torch.zeros(2, *shape, dtype=torch.float64)
    for member in group.readers:
        if member.node in grams:
            W = edit.attribute(gm, member.node).detach().double()
            for moments, total in zip((grams[member.node], W.T @ W), both, strict=True):
                for at, block in zip(*maps.positions(member, group.block), strict=True):
                    total[block] += moments[at][:, at]
    x, w = (torch.block_diag(*side) for side in both)  # type: ignore[no-untyped-call]
    T = balanced(x, w, group.block)
    return hadamard.transform(T.mT, hadamard.largest_block(group.block)).mT
