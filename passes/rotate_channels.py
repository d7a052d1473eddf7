"""`rotate_channels`: spread outliers over all channels by orthogonal maps, offline where the graph allows it and online where not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, hadamard, maps
from ir.cache import CacheSite, cache_sites
from ir.channels import ChannelGroup, Map, channel_groups
from ir.dot_products import Query, queries
from ir.errors import OptionError
from ir.match import aten, operand
from ir.online import online_inputs
from ir.ops import HADAMARD
from ir.signature import Signature
from ir.sites import Layer
from passes.base import Context, Effect, Pass

ROTATIONS = ("R1", "R2", "R3", "R4")
KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "hadamard": lambda n, seed: hadamard.hadamard(n),
    "random_hadamard": hadamard.random_hadamard,
    "orthogonal": hadamard.random_orthogonal,
}


@dataclass(frozen=True)
class RotateChannels(Pass):
    """Rotate channels, so that no channel is far greater than the others.

    Before::

        %2 = aten.linear(%1, %v); ... %8 = aten.linear(%7, %o); ... %20 = aten.mul(%18, %19); %21 = aten.linear(%20, %down)

    After::

        %2 = aten.linear(%1, %v_rotated); ... %8 = aten.linear(%7, %o_rotated); ...
        %20 = aten.mul(%18, %19); %21 = fxpress.hadamard(%20, 704); %22 = aten.linear(%21, %down_rotated)

    Law: `(x Qᵀ)(W Qᵀ)ᵀ = x Wᵀ` for orthogonal `Q`, and an RMS norm without a gain commutes with `Q`. Names as in SpinQuant (2405.16406):
    R1 rotates the residual stream and R2 the values of each head; both are folded into weights. R3 rotates queries and keys of each head
    where they meet, for the cache: folded into weights if nothing between forbids it, else a Hadamard operator after the rotary embedding.
    R4 is a Hadamard operator before linears whose inputs cannot be rotated offline because a nonlinearity makes them; its other half is
    folded into their weights.

    Limits: 1. weights are not quantized yet; 2. R1 needs norms without gains and means (run `fold_norm` and `center_norm` first); 3. R3 and
    R4 are Hadamard matrices whatever `kind` says. Orders without a known Hadamard matrix are split into the greatest blocks that have one.
    Groups that could not be rotated are noted, with the reason.

    Args:
        where: any of R1, R2, R3, R4.
        kind: of R1 and R2: "hadamard", "random_hadamard" (its columns' signs drawn) or "orthogonal" (drawn uniformly).
        block: the greatest order of a Hadamard matrix, for runtimes whose kernel has one; -1 for no limit.
        seed: of what is drawn.
    """

    where: tuple[str, ...] = ("R1", "R2", "R4")
    kind: str = "hadamard"
    block: int = -1
    seed: int = 0
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        self.take_names("where", ROTATIONS)
        if self.kind not in KINDS:
            raise OptionError(
                f"there is no rotation of kind {self.kind!r}", where="rotate_channels(kind=...)", remedy=f"there are {list(KINDS)}"
            )
        if self.block != -1 and (self.block < 2 or not hadamard.exists(self.block)):
            raise OptionError(
                f"no Hadamard matrix of order {self.block} can be made", where="rotate_channels(block=...)", remedy="powers of two work"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Rotate group by group, then insert the operators; returns the number of groups and of operators."""
        groups = channel_groups(gm, Map.ROTATE)
        online, left = online_inputs(gm, groups)
        elsewhere = {layer.weight for found in online.values() for layer in found}  # R4's, not R1's
        changed = 0
        for index, group in enumerate(ctx.track(groups, "rotate")):
            name = role(group)
            if name in self.where and not group.reason:
                maps.apply(gm, group, self._matrix(group, self.seed + index))
                changed += 1
            elif name in self.where and group.reason and {member.node for member in group.readers} - elsewhere:
                ctx.notes.append(f"rotate_channels: {name} left out {_names(group)}: {group.reason}")
        if "R3" in self.where:
            changed += sum(self._compare(gm, site, met) for site, met in _comparisons(gm, groups, ctx))
        if "R4" in self.where:
            ctx.notes += [f"rotate_channels: R4 left out {path}: {reason}" for path, reason in left.items()]
            for source, found in ctx.track(online.items(), "rotate online"):
                self._online(gm, source, found)
            changed += len(online)
        return changed

    def _order(self, n: int) -> int:
        """The order of the Hadamard matrices for `n` channels."""
        return hadamard.largest_block(n if self.block == -1 or n % self.block else self.block)

    def _matrix(self, group: ChannelGroup, seed: int) -> Tensor:
        """`[blocks, block, block]`, the same in every block."""
        size = group.block if self.kind == "orthogonal" and self.block == -1 else self._order(group.block)
        one = torch.kron(torch.eye(group.block // size, dtype=torch.float64), KINDS[self.kind](size, seed).contiguous())
        return one.expand(group.blocks, -1, -1)

    def _online(self, gm: GraphModule, source: Node, found: list[Layer]) -> None:
        """R4: one operator for all linears that read `source`, its inverse in their weights."""
        order = self._order(edit.value(source).shape[-1])
        first = min(layer.node for layer in found)
        rotated = edit.emit(gm, HADAMARD, (source, order), before=first)
        for layer in found:
            weight = edit.attribute(gm, layer.weight)
            edit.set_attribute(gm, layer.weight, hadamard.transform(weight.double(), order).to(weight.dtype))
            layer.site("input").read(rotated)

    def _compare(self, gm: GraphModule, key: CacheSite, met: list[Query]) -> int:
        """R3: the new keys, before they enter the cache, and every query that meets them."""
        order = self._order(key.width)
        rotated = edit.emit(gm, HADAMARD, (key.new, order), before=key.joined)
        edit.set_operand(key.joined, "tensors", [key.past, rotated])
        for node, name in met:
            query = edit.emit(gm, HADAMARD, (operand(node, name), order), before=node)
            edit.set_operand(node, name, query)
        return 1


def role(group: ChannelGroup) -> str:
    """Which rotation a group stands for: R3 if nothing reads its channels but a dot product, R1 if they are one block, else R2."""
    if not group.readers:
        return "R3"
    return "R1" if group.blocks == 1 else "R2"


def _names(group: ChannelGroup) -> str:
    paths = list(dict.fromkeys(member.path for member in group.readers))
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _comparisons(gm: GraphModule, groups: list[ChannelGroup], ctx: Context) -> Iterator[tuple[CacheSite, list[Query]]]:
    """Every cached key that is not rotated offline, with the queries that meet it."""
    signature: Signature | None = gm.meta.get("signature")
    if signature is None or not signature.layers:
        ctx.notes.append("rotate_channels: R3 left out all keys: the model keeps no cache of them")
        return
    offline = {member.node for group in groups if role(group) == "R3" and not group.reason for member in group.writers}
    for name, site in cache_sites(gm):
        if not name.endswith(".key"):
            continue
        found, reason = ([], site) if isinstance(site, str) else queries(site)
        if reason:
            ctx.notes.append(f"rotate_channels: R3 left out the keys {name}: {reason}")
        elif not isinstance(site, str) and not _written_by(site.new) & offline:
            yield site, found


def _written_by(node: Node) -> set[Node]:
    """The stored tensors behind a value, up to the next linears."""
    frontier, found = [node], set()
    while frontier:
        for read in frontier.pop().all_input_nodes:
            if read.op == "get_attr":
                found.add(read)
            elif read.target is aten.linear.default:
                found.update(read.all_input_nodes[1:])
            elif read.op == "call_function" and isinstance(edit.value(read), torch.Tensor):
                frontier.append(read)
    return found
