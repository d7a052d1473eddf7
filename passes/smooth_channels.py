"""`smooth_channels`: move the range of activations into weights, channel by channel."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, maps, smoothing
from ir.channels import ChannelGroup, Map, Member, channel_groups
from ir.errors import OptionError
from ir.sites import Layer, chosen, readers
from ir.statistics import TensorStatistics
from passes import policies
from passes.base import Context, Effect, Pass
from passes.data.observation import observed, tokens_of, watch
from passes.memo.packed import TABLE
from passes.policies import Search

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
        self.take_names("where", PLACES)
        if not 0 <= self.alpha <= 1 or not 0 < self.quantile <= 1:
            raise OptionError("alpha lies from 0 to 1, quantile above 0 and up to 1", where=str(self))

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Statistics or calibration data; the data, for the search."""
        if self.search or ctx.statistics is None:
            self.need_calibration(ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Scale group by group."""
        statistics = ctx.statistics = ctx.statistics or observed(gm, ctx)
        paths = {source: found[0].path for source, found in readers(gm).items()}
        plans = self._plans(gm, ctx)
        samples = _samples(gm, ctx, [source for plan in plans for source in plan.sources]) if self.search else {}
        searches: dict[str, Search] = {}
        for plan in ctx.track(plans, "smooth"):
            if self.search:
                tokens = {source: samples[source] for source in plan.sources}
                path = plan.read[0][1].path
                errors = ctx.memo.kept(f"errors of {path}", partial(self._errors, plan, tokens), TABLE)
                found = searches[path] = self._search(partial(_looked_up, errors))
                s = plan.scales(found.taken.alpha, found.taken.q, tokens)
            else:
                seen = {source: statistics[paths[source]] for source in plan.sources}
                s = plan.scales(self.alpha, "mean" if self.mean else self.quantile, seen)
            maps.apply(gm, plan.group, 1 / s.double())
        if searches:
            ctx.tables |= policies.tables(searches)
        return len(plans)

    def _plans(self, gm: GraphModule, ctx: Context) -> list["_Plan"]:
        """The groups to scale; others that count are noted."""
        counted = {layer.weight: layer for layer in chosen(gm)}
        values = _mixed_by_attention(gm)
        plans = []
        for group in channel_groups(gm, Map.SCALE):
            read = [(member, counted[member.node]) for member in group.readers if member.node in counted]
            if not read or (group.writers and _place(group, values) not in self.where):
                continue
            if group.reason:
                ctx.notes.append(f"smooth_channels: left out {read[0][1].path}: {group.reason}")
            else:
                plans.append(_Plan(gm, group, read))
        return plans

    def _search(self, error: Callable[[smoothing.Policy], float]) -> Search:
        """The policy with the least error."""
        return policies.among(AWQ, error) if self.mean else policies.crossed(smoothing.N1, smoothing.N2, error)

    def _errors(self, plan: "_Plan", tokens: Mapping[Node, Tensor]) -> dict[tuple[str, str], float]:
        """The errors of the readers' outputs that the search comes across: scales of one half of the tokens, the error on the other."""
        halves = {source: X.tensor_split(2) for source, X in tokens.items()}
        seen, held = ({source: half[side] for source, half in halves.items()} for side in (0, 1))
        bits_w, bits_x = plan.bits("weight"), plan.bits("input")
        weights = {source: plan.weight(source) for source in plan.sources}

        def error(policy: smoothing.Policy) -> float:
            s = plan.scales(policy.alpha, policy.q, seen)
            errors = [
                smoothing.layer_error(held[source], W, plan.spread(s, source), bits_x, bits_w, self.rotated)[0].square()
                for source, W in weights.items()
            ]
            return float(sum(errors))

        return {_name(policy): found for policy, found in self._search(error).errors.items()}


def _looked_up(errors: Mapping[tuple[str, str], float], policy: smoothing.Policy) -> float:
    return errors[_name(policy)]


def _name(policy: smoothing.Policy) -> tuple[str, str]:
    return str(policy.alpha), str(policy.q)


@dataclass(frozen=True)
class _Plan:
    """A group to be scaled, with the columns that count and the linears that they belong to."""

    gm: GraphModule
    group: ChannelGroup
    read: list[tuple[Member, Layer]]

    @property
    def sources(self) -> list[Node]:
        """The tensors that are read."""
        return list(dict.fromkeys(layer.site("input").operand for _, layer in self.read))

    def _readers(self, source: Node) -> list[tuple[Member, Layer]]:
        return [(member, layer) for member, layer in self.read if layer.site("input").operand is source]

    def bits(self, operand: str) -> int | None:
        """Of an operand of the readers: as annotated, None if only others are, 4 if nothing is."""
        layer = self.read[0][1]
        encoding = layer.site(operand).encoding
        annotated = any(layer.site(name).encoding for name in ("weight", "input"))
        return encoding.bits if encoding else None if annotated else 4

    def weight(self, source: Node) -> Tensor:
        """The weights of all that read one tensor, row on row."""
        return torch.cat([edit.attribute(self.gm, layer.weight).detach().float() for _, layer in self._readers(source)])

    def spread(self, s: Tensor, source: Node) -> Tensor:
        """Scales of the group's channels at the positions of one tensor."""
        channels = self._readers(source)[0][0].channels
        return torch.where(channels >= 0, s[channels.clamp_min(0)], 1.0)

    def scales(self, alpha: float, statistic: smoothing.Statistic, seen: Mapping[Node, Tensor | TensorStatistics]) -> Tensor:
        """`s` of the group's channels, from statistics or tokens of every source; at several positions, the greatest magnitudes count."""
        activation, weight = (torch.zeros(self.group.size) for _ in range(2))
        for source in self.sources:
            magnitude = smoothing.magnitude(seen[source], statistic).float()
            for member, layer in self._readers(source):
                columns = smoothing.weight_magnitude(edit.attribute(self.gm, layer.weight).float())
                columns = torch.ones_like(columns) if statistic == "mean" else columns
                own = member.channels >= 0
                for whole, part in ((activation, magnitude), (weight, columns)):
                    whole.scatter_reduce_(0, member.channels[own], part[own], "amax")
        return smoothing.scales(activation, weight, alpha, normalised=True)


def _mixed_by_attention(gm: GraphModule) -> set[Node]:
    """Weights whose columns read the values of attention: channels that tolerate mixing within a head."""
    return {member.node for group in channel_groups(gm, Map.LINEAR) if not group.reason for member in group.readers}


def _place(group: ChannelGroup, values: set[Node]) -> str:
    """Which of `PLACES` absorbs the scales of a group."""
    if any(member.node in values for member in group.readers):
        return "values"
    return "mlp" if any(member.node.op == "get_attr" and edit.value(member.node).ndim > 1 for member in group.writers) else "norm"


def _samples(gm: GraphModule, ctx: Context, sources: Collection[Node]) -> dict[Node, Tensor]:
    """Some calibration tokens of each tensor, `[tokens, channels]`, evenly from all batches, in an order of no meaning."""
    kept: dict[Node, list[Tensor]] = {source: [] for source in sources}
    watch(gm, ctx, kept, lambda source, value: kept[source].append(tokens_of(value, ctx, SAMPLE).float()), "sample")
    generator = torch.Generator().manual_seed(0)
    owners = ctx.ranks.owners(len(ctx.calibration))
    every = {source: ctx.ranks.collect(owners, [{"": own} for own in rows]) for source, rows in kept.items()}
    joined = {source: torch.cat([own[""] for own in rows]) for source, rows in every.items()}
    return {source: rows[torch.randperm(len(rows), generator=generator)] for source, rows in joined.items()}
