"""Presets: named pipelines with options. A preset is a pipeline like any other and prints as one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from ir.errors import OptionError
from ir.schemes import FLOAT, bits_of
from passes.annotate import Annotate
from passes.assign_bits import AssignBits
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.clip_activations import ClipActivations
from passes.fit_budget import FitBudget
from passes.fit_masks import FitMasks
from passes.learn_masks import LearnMasks
from passes.learn_rounding import LearnRounding
from passes.observe import Observe
from passes.pipeline import Pipeline
from passes.quantize import Quantize
from passes.quantize_cache import QuantizeCache
from passes.rotate_channels import RotateChannels
from passes.round_weights import RoundWeights
from passes.sample_text import SampleText
from passes.smooth_channels import PLACES, SmoothChannels
from passes.transforms import MLP, OFFLINE_ONLY, OPENED, transformed

GROUPS = (64, -1)  # that `mixed` chooses among
PROPAGATION = 0.25  # of the prefix's error: all of it follows the calibration data too closely
TRIED = 25  # steps of learned rounding after which choices are compared


def weight_only(
    bits: int,
    *,
    group: int = 64,
    symmetric: bool = False,
    rounding: str = "gptq",
    ignore: Sequence[str] = (),
    head: bool = False,
    embeddings: bool = False,
    cache: int = 16,
) -> Pipeline:
    """Weights in `bits` bits, activations in floating point.

    Args:
        group: weights that share a scale; -1 for one scale per output channel.
        symmetric: without zero points.
        rounding: "nearest", or another method of `round_weights`, which needs calibration data.
        ignore: layers to leave out.
        head: quantize output heads too.
        embeddings: quantize embeddings too.
        cache: bits of the key/value cache, 2 to 8; 16 leaves it in floating point.
    """
    marks = Annotate(
        f"W{bits}A16", group=group, symmetric=symmetric, ignore=cast("tuple[str, ...]", ignore), head=head, embeddings=embeddings
    )
    return Pipeline((Canonicalize(), marks, RoundWeights(rounding), *_cached(cache)))


def both(
    scheme: str,
    *,
    transform: str = "none",
    dynamic: bool = True,
    rounding: str = "nearest",
    quantile: float = 1.0,
    ignore: Sequence[str] = (),
    head: bool = False,
    embeddings: bool = False,
    cache: int = 16,
) -> Pipeline:
    """Weights per output channel and activations in integers.

    Args:
        transform: what keeps the function and comes before: "none", "rotate", "smoothrot" (smoothing, then rotation), "quantile" (the same
            with searched quantiles), "balance" (block transforms in closed form) or "learned" (scales and clips). All but "none" rotate.
        dynamic: activations get a scale per token at run time; else one per tensor, from calibration data.
        quantile: of |x|, to which static ranges are clipped.
        rounding: "nearest", or another method of `round_weights`, which needs calibration data.
        ignore: layers to leave out.
        head: quantize output heads too.
        embeddings: quantize embeddings too.
        cache: bits of the key/value cache, 2 to 8; 16 leaves it in floating point.
    """
    marks = Annotate(scheme, dynamic=dynamic, ignore=cast("tuple[str, ...]", ignore), head=head, embeddings=embeddings)
    if dynamic and quantile != 1.0:
        raise OptionError("quantile clips static ranges", where="quantile", remedy="set dynamic=False too")
    steps = transformed(transform, marks)
    if not dynamic:
        # Statistics come after the weights are rounded, so that they describe the model that will run.
        return Pipeline((*steps, RoundWeights(rounding), Observe(), Quantize(quantile), *_cached(cache)))
    if rounding == "nearest":
        return Pipeline((*steps, RoundWeights(rounding), Quantize(), *_cached(cache)))
    clipped = () if transform == "learned" else (ClipActivations(),)  # which learns them with the scales
    # The method sees inputs as they will be rounded.
    return Pipeline((*steps, *clipped, Quantize(weights=False), RoundWeights(rounding, propagation=PROPAGATION), *_cached(cache)))


def mixed(
    *,
    bits: float = AssignBits.bits,
    memory: float = 0.0,
    bytes: int = 0,
    latency: float = 0.0,
    latencies: str = "",
    widths: Sequence[int | str] = (2, 3, 4, 8),
    groups: Sequence[int] = GROUPS,
    prune: bool = False,
    transform: str = "rotate",
    solver: str = "knapsack",
    rounding: str = "learned",
    steps: int = LearnRounding.steps,
    labels: float = 0.0,
    own_text: bool = True,
    file: str = "",
    measure: int = 0,
    ignore: Sequence[str] = (),
    head: bool = False,
    cache: float = 16.0,
    cache_widths: Sequence[int] = (),
) -> Pipeline:
    """Weights in several widths under one budget; activations in floating point, or in several widths too.

    Args:
        bits: budget: bits per weight, scales and zero points counted.
        memory: budget in place of `bits`: the share that is left of the weights' size in FP16.
        bytes: budget in place of `bits`: bytes of the whole model as it is stored.
        latency: budget in place of `bits`: milliseconds of all chosen linears on one token, by the target's table in the file `latencies`.
        widths: to choose among: of weights, activations then stay in floating point; or schemes such as "W4A8", of both.
        groups: sizes to choose among of groups that share a scale; -1 for one scale per output channel, which integer kernels need.
        prune: drop MLP channels and heads too, in the same search: `fit_budget` in place of `assign_bits`. With masks MLP channels and dims
            that are read from the residual stream or written to it, which rotations mix (`transform="none"`): `fit_masks`.
        transform: "rotate" (the residual stream and the values, folded into the weights) or "none".
        rounding: "learned" on the model's own divergence, or a method of `round_weights`.
        steps: of the learned rounding.
        labels: share that the calibration text's next tokens have in what it learns, as of `learn_rounding`.
        own_text: the model writes as much text as it is calibrated on, and is calibrated on both.
        file: of predicted losses, as of `assign_bits`.
        measure: tokens held out to measure the choice on, as of `assign_bits`; 0 with `prune` for as many as `fit_budget` takes.
        ignore: layers to leave out.
        head: quantize output heads too.
        cache: bits of the key/value cache, 2 to 8; 16 leaves it in floating point.
        cache_widths: widths of keys and values to choose among; `cache` is then their budget in bits an element, as of `quantize_cache`.
    """
    if transform not in OFFLINE_ONLY:
        raise OptionError(f"there is no transform {transform!r}", where="mixed(transform=...)", remedy=f"there are {list(OFFLINE_ONLY)}")
    names = cast("tuple[str, ...]", ignore)
    schemes = [width for width in widths if isinstance(width, str)]
    if schemes and len(schemes) != len(widths):
        remedy = "give widths=(2, 3, 4, 8), or widths=('W4A4', 'W8A8')"
        raise OptionError(f"widths are all numbers or all schemes, not {list(widths)}", where="mixed(widths=...)", remedy=remedy)
    rounds = any(bits_of(scheme, "mixed(widths=...)")[1] != FLOAT for scheme in schemes)
    if solver == "masks":
        if len(widths) != 2 or (memory and not prune) or bytes or latency or schemes:
            problem = "masks choose between two widths of weights, under a budget in bits, or in memory with prune"
            raise OptionError(problem, where="mixed", remedy="set widths=(1, 4); of activations too: split_channels, or learn_masks")
        if file or measure or tuple(groups) != GROUPS:
            raise OptionError("masks have no use for file, measure and groups", where="mixed", remedy="leave them out with solver='masks'")
        low, high = sorted(widths)
        # Parts of a linear have one scale per channel: groups would not fit into their sizes.
        marks = Annotate(f"W{low}A16", symmetric=low == 1, ignore=names, head=head)
        masks = FitMasks if prune else LearnMasks
        chosen: Pass = masks(f"W{high}A16", bits=FLOAT * memory or bits)
    elif solver == "knapsack":
        marks = Annotate("W8A8" if rounds else "W4A16", group=64, symmetric=False, ignore=names, head=head)
        finish = str(LearnRounding(steps=min(steps, TRIED))) if rounding == "learned" and not rounds else ""
        joint = partial(FitBudget, measure=measure or FitBudget.measure, finish=finish)
        search = joint if prune else partial(AssignBits, measure=measure)
        chosen = search(
            bits=bits,
            memory=memory,
            bytes=bytes,
            latency=latency,
            latencies=latencies,
            widths=cast("tuple[int | str, ...]", widths),
            groups=cast("tuple[int, ...]", groups),
            file=file,
        )
    else:
        raise OptionError(f"there is no solver {solver!r}", where="mixed(solver=...)", remedy="there are ['knapsack', 'masks']")
    propagation = None if rounding == "nearest" else PROPAGATION
    rounded: tuple[Pass, ...]
    if rounding == "learned":  # which rounds annotated inputs itself
        rounded = (LearnRounding(steps=steps, labels=labels), *((Quantize(),) if rounds else ()))
    else:
        rounded = (*((Quantize(weights=False),) if rounds else ()), RoundWeights(rounding, propagation=propagation))
    clipped = (ClipActivations(),) if rounds else ()  # for the widths that were chosen
    written = (SampleText(),) if own_text else ()
    return Pipeline((*OFFLINE_ONLY[transform], *written, marks, chosen, *clipped, *rounded, *_cached(cache, cache_widths)))


def rotate(*, where: Sequence[str] = ("R1", "R2", "R4"), kind: str = "hadamard", block: int = -1, seed: int = 0) -> Pipeline:
    """Rotations only; options as of `rotate_channels`."""
    return Pipeline((*OPENED, RotateChannels(cast("tuple[str, ...]", where), kind, block, seed)))


def smooth(
    *, alpha: float = 0.5, quantile: float = 1.0, mean: bool = False, search: bool = False, where: Sequence[str] = PLACES
) -> Pipeline:
    """Smoothing only; options as of `smooth_channels`."""
    return Pipeline((*OPENED, SmoothChannels(alpha, quantile, mean, search, where=cast("tuple[str, ...]", where))))


def smoothrot(*, alpha: float = 0.5, quantile: float = 1.0, search: bool = False) -> Pipeline:
    """Smoothing of what a gate or a ReLU writes, then rotation: SmoothRot (2506.05413), with quantiles (2606.09927)."""
    return Pipeline((*OPENED, SmoothChannels(alpha, quantile, search=search, rotated=search, where=MLP), RotateChannels()))


def _cached(bits: float, widths: Sequence[int] = ()) -> tuple[Pass, ...]:
    """The pass that quantizes the cache, last: it changes what the graph takes in; none at 16 bits, unless widths are chosen."""
    return () if bits == FLOAT and not widths else (QuantizeCache(bits, widths=cast("tuple[int, ...]", widths)),)


@dataclass(frozen=True)
class Preset:
    """A named pipeline: how it is made from options, and what it is for."""

    make: Callable[..., Pipeline]
    summary: str


ROUNDING = {
    "w8a8": Preset(partial(both, "W8A8"), "8-bit weights per channel, 8-bit activations per token, or static with dynamic=False"),
    "w8a16": Preset(
        partial(weight_only, 8, group=32, symmetric=True, rounding="nearest"),
        "8-bit weights in groups of 32, to nearest: near lossless, needs no calibration data",
    ),
    "w4a16": Preset(partial(weight_only, 4), "4-bit weights in groups of 64 with zero points, by GPTQ"),
    "w3a16": Preset(partial(weight_only, 3), "3-bit weights in groups of 64 with zero points, by GPTQ"),
    "w2a16": Preset(partial(weight_only, 2), "2-bit weights in groups of 64 with zero points, by GPTQ"),
    "w4a8": Preset(partial(both, "W4A8", rounding="gptq"), "4-bit weights per channel by GPTQ, 8-bit activations per token"),
    "w4a4": Preset(
        partial(both, "W4A4", transform="balance", rounding="gptq"),
        "4-bit weights per channel by GPTQ, 4-bit activations per token, after rotations and block transforms",
    ),
    "w3a3": Preset(partial(both, "W3A3", transform="balance", rounding="gptq"), "3-bit weights and activations, likewise"),
}
TRANSFORMING = {
    "rotate": Preset(rotate, "rotations only, folded into weights where possible"),
    "smooth": Preset(smooth, "smoothing only, folded into norms and weights"),
    "smoothrot": Preset(smoothrot, "smoothing of the down projections' inputs, then rotations"),
}
PRESETS = ROUNDING | {"mixed": Preset(mixed, "several widths under one budget, by their predicted loss; learned rounding")} | TRANSFORMING

w8a8, w8a16, w4a16, w3a16, w2a16, w4a8, w4a4, w3a3 = (preset.make for preset in ROUNDING.values())

# Ready made, to be spread into a pipeline of one's own: `[MyPass(), *presets.W4A16]`.
W8A8, W8A16, W4A16, W3A16, W2A16, W4A8, W4A4, W3A3 = (preset.make() for preset in ROUNDING.values())
