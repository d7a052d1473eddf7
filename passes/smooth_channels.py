"""`smooth_channels`: move the range of activations into weights, channel by channel."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, evaluate, maps, smoothing
from ir.channels import ChannelGroup, Map, Member, channel_groups
from ir.errors import DataError, OptionError
from ir.sites import Layer, heads, readers
from ir.statistics import TensorStatistics
from passes.base import Context, Effect, Pass
from passes.observation import observed

PLACES = ("norm", "mlp", "values")
AWQ = tuple(smoothing.Policy(round(0.05 * i, 2), "mean") for i in range(21))
SAMPLE = 512  # tokens of the calibration data that policies are compared on


@dataclass(frozen=True)
class SmoothChannels(Pass):
    """Divide the channels of activations by scales `s`, and multiply the columns that read them.

    Before::

        %1 = aten.rms_norm(%x, [64], None); %2 = aten.linear(%1, %q); ... %9 = aten.mul(%7, aten.linear(%6, %up)); aten.linear(%9, %down)

    After::

        %1 = aten.rms_norm(%x, [64], %1_over_s); %2 = aten.linear(%1, %q_s); ... the rows of %up over s, the columns of %down times s

    Law: `(x / s)(W diag(s))ᵀ = x Wᵀ`; the division is folded into the gain of a norm, or the rows of the linear that writes the channel.
    `s_j = a_j^α / w_j^(1−α)`, with `a_j` a quantile of |x_j| over calibration tokens (2606.09927; its maximum is SmoothQuant's, 2211.10438)
    or its mean (AWQ's, 2306.00978), and `w_j` the greatest |W| in column j over all readers.

    Limits: 1. weights are not quantized yet; 2. groups whose scales nothing absorbs are left, with a note. Where a recipe has
    annotated layers, only groups that these read are scaled.

    Args:
        alpha: how much of the range moves, 0 to 1.
        quantile: of |x|; 1 is the maximum.
        mean: take AWQ's scales, `s = mean|x|^α`, instead.
        search: choose α and quantile for each group by the error of its readers in the annotated encodings (4 bits if there are none),
            on 512 calibration tokens: the grids N1 and N2 of 2606.09927, then the product of their best; with `mean`, AWQ's grid of α.
        rotated: the error of the search is that behind a Hadamard rotation (`rotate_channels` with R4 comes next).
        where: "norm" (what norms write), "mlp" (what a linear writes and another reads, through a gate or a ReLU), "values" (of attention).

    Statistics come from an `observe` before it, else they are measured now.

    Raises:
        DataError: neither statistics nor calibration data.
    """

    alpha: float = 0.5
    quantile: float = 1.0
    mean: bool = False
    search: bool = False
    rotated: bool = False
    where: tuple[str, ...] = PLACES
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        where = (self.where,) if isinstance(self.where, str) else tuple(self.where)
        object.__setattr__(self, "where", where)
        if not where or set(where) - set(PLACES):
            raise OptionError(
                f"scales cannot be folded into {list(where)}", where="smooth_channels(where=...)", remedy=f"there are {list(PLACES)}"
            )
        if not 0 <= self.alpha <= 1 or not 0 < self.quantile <= 1:
            raise OptionError("alpha lies from 0 to 1, quantile above 0 and up to 1", where=str(self))

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Statistics or calibration data; the data, for the search."""
        if not ctx.calibration and (self.search or ctx.statistics is None):
            raise DataError("smooth_channels needs calibration data", remedy="pass calibration=[{'input_ids': ids}, ...]")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Scale group by group."""
        ctx.statistics = ctx.statistics or observed(gm, ctx)
        inputs = _inputs(gm)
        values = _mixed_by_attention(gm)
        plans = []
        for group in channel_groups(gm, Map.SCALE):
            read = [inputs[member.node] for member in group.readers if member.node in inputs]
            if not read or (group.writers and _place(group, values) not in self.where):
                continue
            if group.reason:
                ctx.notes.append(f"smooth_channels: left out {read[0].layer.path}: {group.reason}")
                continue
            plans.append(_Plan(gm, ctx, group, read))
        samples = _samples(gm, ctx, [plan.source for plan in plans]) if self.search else {}
        for plan in ctx.track(plans, "smooth"):
            s = (
                self._searched(plan, samples[plan.source])
                if self.search
                else plan.scales(self.alpha, "mean" if self.mean else self.quantile)
            )
            maps.apply(gm, plan.group, 1 / s.double())
        return len(plans)

    def _searched(self, plan: "_Plan", X: Tensor) -> Tensor:
        """The scales of the policy with the least error of the readers' outputs on the tokens `X`."""
        half = len(X) // 2
        W, bits_w, bits_x = plan.readers_weight(), plan.bits("weight"), plan.bits("input")

        def error(policy: smoothing.Policy) -> float:
            s = plan.spread(plan.scales(policy.alpha, policy.q, X[:half]))
            return float(smoothing.layer_error(X[half:], W, s, bits_x, bits_w, self.rotated)[0])

        if self.mean:
            return plan.scales(min(AWQ, key=error).alpha, "mean", X)
        alphas = sorted(smoothing.N1, key=error)[:5]
        quantiles = sorted(smoothing.N2, key=error)[:5]
        best = min(smoothing.product([p.alpha for p in alphas], [p.q for p in quantiles]), key=error)
        return plan.scales(best.alpha, best.q, X)


@dataclass(frozen=True)
class _Read:
    """A linear with what it reads and the key of its statistics."""

    layer: Layer
    source: Node
    key: str


@dataclass
class _Plan:
    """A group to be scaled."""

    gm: GraphModule
    ctx: Context
    group: ChannelGroup
    read: list[_Read]

    @property
    def source(self) -> Node:
        """The tensor that its first reader reads."""
        return self.read[0].source

    @property
    def members(self) -> list[Member]:
        """The columns of the readers that count."""
        weights = {read.layer.weight for read in self.read}
        return [member for member in self.group.readers if member.node in weights]

    def bits(self, operand: str) -> int | None:
        """Of an operand of the readers: as annotated, None if only others are, 4 if nothing is."""
        encoding = self.read[0].layer.site(operand).encoding
        annotated = any(self.read[0].layer.site(name).encoding for name in ("weight", "input"))
        return encoding.bits if encoding else None if annotated else 4

    def readers_weight(self) -> Tensor:
        """The weights of all that read the first reader's tensor, row on row."""
        rows = [edit.attribute(self.gm, read.layer.weight).detach().float() for read in self.read if read.source is self.source]
        return torch.cat(rows)

    def spread(self, s: Tensor) -> Tensor:
        """Scales of the group's channels at the positions of the first reader's input."""
        channels = self.members[0].channels
        return torch.where(channels >= 0, s[channels.clamp_min(0)], 1.0)

    def scales(self, alpha: float, statistic: Any, X: Tensor | None = None) -> Tensor:
        """`s` of the group's channels, from the statistics or from tokens; at several positions, their greatest magnitudes count."""
        activation, weight = (torch.zeros(self.group.size) for _ in range(2))
        for member, read in zip(self.members, self.read, strict=True):
            seen: Tensor | TensorStatistics = self.ctx.statistics[read.key] if X is None else X  # type: ignore[index]
            columns = smoothing.weight_magnitude(edit.attribute(self.gm, read.layer.weight).float())
            columns = torch.ones_like(columns) if statistic == "mean" else columns
            for whole, part in ((activation, smoothing.magnitude(seen, statistic).float()), (weight, columns)):
                own = member.channels >= 0
                whole.scatter_reduce_(0, member.channels[own], part[own], "amax")
        return smoothing.scales(activation, weight, alpha, normalised=True)


def _inputs(gm: GraphModule) -> dict[Node, _Read]:
    """The linears that count, by the get_attr node of their weight: annotated ones if there are any, else all but output heads."""
    found = readers(gm)
    annotated = any(layer.site("weight").encoding for group in found.values() for layer in group)
    outputs = heads(gm)
    return {
        layer.weight: _Read(layer, source, group[0].path)
        for source, group in found.items()
        for layer in group
        if (layer.site("weight").encoding is not None if annotated else layer.node not in outputs)
    }


def _mixed_by_attention(gm: GraphModule) -> set[Node]:
    """Weights whose columns read the values of attention: channels that tolerate mixing within a head."""
    return {member.node for group in channel_groups(gm, Map.LINEAR) if not group.reason for member in group.readers}


def _place(group: ChannelGroup, values: set[Node]) -> str:
    """Which of `PLACES` absorbs the scales of a group."""
    if any(member.node in values for member in group.readers):
        return "values"
    return "mlp" if any(member.node.op == "get_attr" and edit.value(member.node).ndim > 1 for member in group.writers) else "norm"


def _samples(gm: GraphModule, ctx: Context, sources: list[Node]) -> dict[Node, Tensor]:
    """Some calibration tokens of each tensor, `[tokens, channels]`, evenly from all batches."""
    wanted = dict.fromkeys(sources)  # in order: one generator draws for all
    share = -(-SAMPLE // max(len(ctx.calibration), 1))
    kept: dict[Node, list[Tensor]] = {source: [] for source in wanted}

    def tap(node: Node, value: Any) -> None:
        if node in wanted:
            rows = value.flatten(0, -2)
            kept[node].append(rows[torch.linspace(0, len(rows) - 1, min(share, len(rows))).long()].float())

    for batch in ctx.track(ctx.calibration, "sample"):
        evaluate.run(gm, batch, tap)
    generator = torch.Generator().manual_seed(0)
    joined = {source: torch.cat(rows) for source, rows in kept.items()}
    return {source: rows[torch.randperm(len(rows), generator=generator)] for source, rows in joined.items()}
