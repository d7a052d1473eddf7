"""`balance_channels`: the non-diagonal transform in closed form that makes activations and weights equally easy to round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import block_transform, edit, hadamard, maps
from ir.channels import ChannelGroup, Map, channel_groups
from ir.errors import OptionError
from ir.match import aten
from ir.online import online_inputs
from ir.ops import HADAMARD
from ir.sites import Layer, chosen
from passes.base import Context, Effect, Pass
from passes.data.observation import tokens_of, total
from passes.memo.packed import like


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
        self.need_calibration(ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Balance heads, then inputs; returns how many groups and inputs."""
        counted = {layer.weight: layer.site("input").operand for layer in chosen(gm)}
        groups = [
            group
            for group in channel_groups(gm, Map.LINEAR)
            if not group.reason and group.writers and any(member.node in counted for member in group.readers)
        ]
        heads = [_Balance.of_group(gm, group, counted) for group in groups]
        inputs = self._online_inputs(gm, ctx) if self.online else {}
        sums = [_Balance.of_input(gm, source, layers, self.block) for source, layers in inputs.items()]
        self._measure(gm, ctx, [*heads, *sums])
        for group, balance in zip(ctx.track(groups, "balance"), heads, strict=True):
            T = balance.transform()
            maps.apply(gm, group, hadamard.transform(T.mT, hadamard.largest_block(group.block)).mT)
        for (source, layers), balance in zip(inputs.items(), sums, strict=True):
            _insert(gm, source, layers, balance.transform())
        return len(groups) + len(inputs)

    def _online_inputs(self, gm: GraphModule, ctx: Context) -> dict[Node, list[Layer]]:
        found, left = online_inputs(gm, channel_groups(gm, Map.ROTATE))
        for source, layers in list(found.items()):
            if edit.value(source).shape[-1] % self.block:
                left[layers[0].path] = f"blocks of {self.block} do not divide {edit.value(source).shape[-1]} channels"
                del found[source]
        ctx.notes += [f"balance_channels: left out {path}: {reason}" for path, reason in left.items()]
        return found

    def _measure(self, gm: GraphModule, ctx: Context, balances: Sequence["_Balance"]) -> None:
        """Second moments of what all of them read, in one streaming run."""
        readers: dict[Node, list[tuple[int, _Balance]]] = {}
        for place, balance in enumerate(balances):
            for source in balance.read:
                readers.setdefault(source, []).append((place, balance))

        def zeros() -> list[Tensor]:
            return [torch.zeros_like(balance.activation) for balance in balances]

        def take(sums: Sequence[Tensor], source: Node, value: Tensor) -> None:
            rows = tokens_of(value, ctx, self.tokens).float()
            for place, balance in readers[source]:
                balance.add(sums[place], source, rows)

        made = ctx.memo.kept("second moments", lambda: total(gm, ctx, readers, zeros, take, "second moments"), like(zeros()))
        for balance, activation in zip(balances, made, strict=True):
            balance.activation = activation


class _Balance:
    """Second moments of both sides of some blocks, `[m, b, b]` each, and how the tensors that are read lie in them.

    Args:
        m, b: blocks, and their channels.
        read: for each tensor, channels that are copies of blocks, int64 `[copies, b]`, and which blocks they are copies of, `[copies]`.
    """

    def __init__(self, m: int, b: int, read: dict[Node, list[tuple[Tensor, Tensor]]]) -> None:
        self.activation, self.weight = (torch.zeros(m, b, b, dtype=torch.float64) for _ in range(2))
        self.read = read

    @classmethod
    def of_group(cls, gm: GraphModule, group: ChannelGroup, counted: dict[Node, Node]) -> "_Balance":
        """Of a group's readers that count; heads that share their values count together."""
        made = cls(group.blocks, group.block, {})
        for member in group.readers:
            if member.node in counted:
                at = maps.positions(member, group.block)
                made.read.setdefault(counted[member.node], []).append(at)
                _add(made.weight, edit.attribute(gm, member.node).detach().double(), *at)
        return made

    @classmethod
    def of_input(cls, gm: GraphModule, source: Node, layers: Sequence[Layer], block: int) -> "_Balance":
        """Of neighbouring channels of a tensor."""
        channels = block_transform.in_order(edit.value(source).shape[-1], block)
        at = (channels, torch.arange(len(channels)))
        made = cls(len(channels), block, {source: [at]})
        for layer in layers:
            _add(made.weight, edit.attribute(gm, layer.weight).detach().double(), *at)
        return made

    def add(self, activation: Tensor, source: Node, rows: Tensor) -> None:
        """Count some tokens of a tensor, `[tokens, channels]`, among the second moments of activations."""
        for at in self.read[source]:
            _add(activation, rows, *at)

    def transform(self) -> Tensor:
        """`T`, float64 `[m, b, b]`."""
        return block_transform.balanced(self.activation, self.weight)


def _add(total: Tensor, rows: Tensor, channels: Tensor, blocks: Tensor) -> None:
    total.index_add_(0, blocks, block_transform.moments(rows, channels))


def _insert(gm: GraphModule, source: Node, layers: Sequence[Layer], T: Tensor) -> None:
    """A product with blocks and a Hadamard operator before the linears that read `source`, their inverse in the weights."""
    first, value = min(layer.node for layer in layers), edit.value(source)
    matrices = edit.add_attribute(gm, f"{layers[0].path}.balance", T.mT.contiguous().to(value.dtype), before=first)
    sizes: list[Any] = [edit.emit(gm, aten.sym_size.int, (source, axis), before=first) for axis in range(value.ndim - 1)]
    rows = edit.emit(gm, aten.reshape.default, (source, [-1, *T.shape[:2]]), before=first)
    turned = edit.emit(gm, aten.transpose.int, (rows, 0, 1), before=first)
    mixed = edit.emit(gm, aten.bmm.default, (turned, matrices), before=first)
    back = edit.emit(gm, aten.transpose.int, (mixed, 0, 1), before=first)
    result = edit.emit(gm, aten.reshape.default, (back, [*sizes, value.shape[-1]]), before=first)
    order = hadamard.largest_block(value.shape[-1])
    spread = edit.emit(gm, HADAMARD, (result, order), before=first)
    inverse = torch.linalg.inv(T).mT
    for layer in layers:
        W = edit.attribute(gm, layer.weight).detach()
        rotated = hadamard.transform(block_transform.apply(inverse, W.double()), order)
        edit.set_attribute(gm, layer.weight, rotated.to(W.dtype))
        layer.site("input").read(spread)
