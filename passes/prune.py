"""`prune`: drop units for good, from single channels to whole layers, and let what reads them make up for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir.errors import CoverageError, DataError, OptionError
from ir.sites import check_patterns, layers
from passes.base import Context, Effect, Pass
from passes.learning.mask_learning import MaskLearning
from passes.pruning import keeping
from passes.pruning.dropping import drop, tell_left
from passes.pruning.kinds import ALL, KINDS, TOGETHER, WHOLE, Units
from passes.pruning.prunable import found_units
from passes.pruning.query_heads import lined_up
from passes.pruning.unit_losses import losses
from passes.pruning.unit_masks import mask_scores
from passes.pruning.unit_scores import CRITERIA

MASKS, MEASURED = "masks", "measured"  # criteria that are learned, and measured unit by unit
KNOWN = (*CRITERIA, MASKS, MEASURED)
CLOSE = 0.01  # how far the share of weights that goes may be from what was asked for


@dataclass(frozen=True)
class Prune(Pass):
    """Drop channels of MLPs, heads, dims that are read from the residual stream or written to it, branches, or layers.

    Before::

        %2 = aten.linear(%1, %gate): [.., 704]; %3 = aten.linear(%1, %up): [.., 704]; ... %9 = aten.linear(%8, %down): [.., 256]

    After::

        %2 = aten.linear(%1, %gate): [.., 560]; %3 = aten.linear(%1, %up): [.., 560]; ... %9 = aten.linear(%8, %down): [.., 256]

    Law: without refitting, the result is the model with the columns made zero that read what was dropped, or the rows that write it.
    Channels go from every tensor that makes or reads them, numbers in calls and all shapes follow, and the cache shrinks with its heads.

    | units | what goes |
    |---|---|
    | mlp | a channel between linears |
    | heads | a head of keys and values, with its queries |
    | query_heads | of every head of keys one of its queries, after those of each are brought in line |
    | inputs | a dim that the first linears of a branch read, gathered before them; the stream keeps its width |
    | outputs | a dim that the last linear of a branch writes, scattered behind it |
    | blocks | a branch, attention or MLP, with its cache; the caches that are left are counted anew |
    | layers | all branches of a layer |

    The linears that read what is left are refitted, one after the other, on inputs from the already pruned prefix:
    `W' = W_K + W_D G_DK (G_KK + λI)⁻¹`, `G = E[xxᵀ]`, K the columns that stay, D those that go.

    | criterion | drops units with the least | arXiv |
    |---|---|---|
    | magnitude | norm of the rows that make them, times that of the columns that read them, if any | |
    | wanda | `(Σ_j ‖W_:j‖² E[x_j²])^½`; of what no linear reads its norm, of branches over that of the sum | 2306.11695 |
    | taylor | `E|g·x|`, `g` the gradient at what is read | 1611.06440 |
    | fisher | `½ E[(g·x)²]`, nats a token | 1801.05787 |
    | measured | the divergence, nats a token, without the unit: a run for each; of blocks and layers, whose estimates may be far off | |
    | masks | logit of a gate, learned with all others under the share, on the divergence | 2606.07819, 2410.11988 |

    Limits: 1. weights are neither annotated nor quantized yet; 2. kinds that share weights are pruned one after the other; 3. what is
    written, and branches, have no reader to refit (`bias` makes up for the mean of the former); 4. where there is a cache, one attention
    has to be left. Linears without units that can be dropped are noted, with the reason.

    Args:
        share: of the weights of all units, to drop; it is met to 1 %.
        what: kinds of units: "mlp" with "heads" or "query_heads", "inputs" with "outputs", "blocks", or "layers".
        multiple: channels that stay are so many, or a multiple.
        uniform: the same share in every layer, so that the result is a model of the same architecture; else each layer's own, where the
            least is lost over all (scores of magnitude and wanda count as shares of their group's sum), as always of blocks and layers.
        criterion: of the table.
        compensate: refit what reads.
        bias: let linears without one get a bias, which makes up for the mean of what is dropped, and so too for dims that are not
            written; those that have one always use it.
        ignore: layers whose units stay: class names, paths, last components of paths, or `re:` and a regular expression.
        damping: λ, as a share of the mean of diag(G).
        tokens: that gradients are taken from, or that are measured.
        steps: that masks are learned for, each on four samples.
        rate: that they are learned at.
        seed: of what is drawn.

    Raises:
        DataError: no calibration data, unless the criterion is magnitude and nothing is refitted.
        OptionError: options that there are not; layers that are annotated or quantized already.
        CoverageError: the share cannot be met; with `allow_partial` the nearest one is taken.
    """

    share: float = 0.25
    what: tuple[str, ...] = KINDS
    multiple: int = 8
    uniform: bool = True
    criterion: str = "fisher"
    compensate: bool = True
    bias: bool = False
    ignore: tuple[str, ...] = ()
    damping: float = 0.01
    tokens: int = 8192
    steps: int = 500
    rate: float = 0.003
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        self.take_names("what", ALL)
        if not any(set(self.what) <= set(kinds) for kinds in TOGETHER):
            raise OptionError(
                f"{self.what} share weights", where="prune(what=...)", remedy=f"prune twice; together go {', '.join(map(str, TOGETHER))}"
            )
        self.take_several("ignore")
        if self.criterion not in KNOWN:
            raise OptionError(f"there is no criterion {self.criterion!r}", where="prune(criterion=...)", remedy=f"there are {list(KNOWN)}")
        if self.criterion == MEASURED and not self._whole:
            raise OptionError("only blocks and layers are few enough to be measured", where=str(self), remedy="criterion='fisher'")
        if not 0 <= self.share < 1 or min(self.multiple, self.tokens, self.steps) < 1 or self.damping < 0 or not self.rate > 0:
            raise OptionError("a share lies from 0 to below 1, counts are at least 1, damping at least 0, rates positive", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Calibration data, for scores or for refitting."""
        if (
            self.share
            and not ctx.calibration
            and (self.compensate or self.criterion not in CRITERIA or CRITERIA[self.criterion].calibrated)
        ):
            raise DataError(
                "prune needs calibration data",
                remedy="pass calibration=[{'input_ids': ids}, ...], or criterion='magnitude' and compensate=False",
            )

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Weights as the model had them, and patterns that match."""
        found = layers(gm)
        if not ctx.part:
            check_patterns(self.ignore, found, "prune(ignore=...)")
        for layer in found:
            if layer.weight.op != "get_attr" or any(layer.site(name).encoding for name in ("weight", *["input"][: layer.kind == "Linear"])):
                raise OptionError("the layer is annotated or quantized already", where=layer.path, remedy="put prune before annotate")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Choose over all layers, refit block after block, then drop; returns the number of groups that lost units."""
        if not self.share:
            return 0
        units, left = found_units(gm, self.what, self.ignore)
        tell_left(gm, ctx, left, by="prune")
        self._check(self._reachable(units), ctx)  # before long work
        scores = self._scores(gm, ctx, units) if units else []
        counts = self._counts(units, scores)
        self._check(keeping.dropped_share(units, counts), ctx)  # whole units may be coarse
        chosen = [(own, keeping.greatest(score, count)) for own, score, count in zip(units, scores, counts, strict=True)]
        dropped = drop(gm, ctx, chosen, compensate=self.compensate, damping=self.damping, bias=self.bias)
        self._tell(ctx, units, scores, counts)
        return dropped

    def _reachable(self, units: Sequence[Units]) -> float:
        """The share that can be met, as far as can be told without scores."""
        if self.uniform or self._whole:
            return keeping.dropped_share(units, self._counts(units, [torch.ones(own.size) for own in units]))
        return min(keeping.most(units, self.multiple), self.share)

    @property
    def _whole(self) -> bool:
        """Whether units are branches, which stay or go."""
        return self.what[0] in WHOLE

    def _counts(self, units: Sequence[Units], scores: Sequence[Tensor]) -> keeping.Kept:
        """How many units stay."""
        if self._whole:
            return keeping.whole(units, scores, self.share, CLOSE)
        if self.uniform:
            return keeping.uniform(units, self.share, self.multiple)
        absolute = self.criterion not in CRITERIA or CRITERIA[self.criterion].absolute
        relative = scores if absolute else [score / score.sum().clamp_min(1e-30) for score in scores]
        return keeping.free(units, relative, self.share, self.multiple)

    def _scores(self, gm: GraphModule, ctx: Context, units: Sequence[Units]) -> list[Tensor]:
        """Of every unit; the heads of each group of queries are in line after it."""
        single = [own.single for own in units]
        if self.criterion == MASKS:
            scores = mask_scores(gm, ctx, single, self.share, MaskLearning(self.steps, self.rate, self.seed))
        elif self.criterion == MEASURED:
            scores = losses(gm, ctx, single, self.tokens)
        else:
            scores = CRITERIA[self.criterion].scores(gm, ctx, single, self.tokens, self.seed)
        return [score if own.rows == 1 else lined_up(gm, own, score) for own, score in zip(units, scores, strict=True)]

    def _check(self, reached: float, ctx: Context) -> None:
        """Refuse a share that cannot be met.

        Raises:
            CoverageError: the nearest one is too far from it, and nothing may be left.
        """
        if abs(reached - self.share) > CLOSE and not (ctx.allow_partial or ctx.part):
            raise CoverageError(
                f"{self.share:.1%} of the units' weights cannot be dropped: the nearest is {reached:.1%}",
                where="; ".join(note for note in ctx.notes if note.startswith("prune:")) or str(self),
                remedy=f"share={reached:.3f}, a smaller multiple, uniform=False, or allow_partial=True to take the nearest",
            )

    def _tell(self, ctx: Context, units: Sequence[Units], scores: Sequence[Tensor], counts: keeping.Kept) -> None:
        """What went, in a note and a table."""
        reached = keeping.dropped_share(units, counts)
        ctx.notes.append(f"prune: {reached:.2%} of the weights of {len(units)} groups of units are dropped")
        ctx.tables["pruned"] = [
            {"layer": own.path, "units": own.what, "kept": count, "of": own.size, self.criterion: _lost(score, count)}
            for own, score, count in zip(units, scores, counts, strict=True)
        ]


def _lost(score: Tensor, count: int) -> float:
    """The sum of what is dropped."""
    return float(score.double().sort().values[: len(score) - count].sum())
