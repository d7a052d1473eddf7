"""`learn`: scales, rotations and clipping ratios by gradient, through the rounding that comes after."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ir import edit, evaluate, hadamard, maps
from ir.blocks import Block, blocks
from ir.channels import ChannelGroup, Map, channel_groups
from ir.errors import OptionError
from ir.online import online_inputs
from ir.sites import chosen, layers, readers
from passes.base import Context, Effect, Pass
from passes.learning.descent import Loss, descend, needs_two, shuffled, some_rows, split
from passes.learning.divergence import of_outputs, own_outputs
from passes.learning.student import Student, Values, ratio, uses

MAPS = {"rotations": Map.ROTATE, "scales": Map.SCALE}  # in the order that they are applied
T = TypeVar("T")


@dataclass(frozen=True)
class Learn(Pass):
    """Learn maps of channels, and clipping ratios, through the rounding of annotated operands.

    Before::

        %1 = aten.rms_norm(%x, [64], None); %2 = aten.linear(%1, %q) {input: i4[1,-1]dynamic, weight: i4[1,-1]}

    After::

        %1 = aten.rms_norm(%x, [64], %1_over_s); %2 = aten.linear(%1, %q_s) {input: i4[1,-1]dynamic*0.87, weight: i4[1,-1]}

    Law: as `smooth_channels` and `rotate_channels`; what is learned are the maps, which keep the function, and the clips, which are
    annotations. Weights are rounded to nearest while learning; `round_weights` then chooses their integers, and the clips of their scales.

    Scales (T1 to T3 of 2606.09927, over all linears), rotations (R1 and R2, as SpinQuant, 2405.16406) and clips (as OmniQuant,
    2308.13137) are learned together by Adam with a cosine schedule, straight-through rounding, and dynamic scales differentiated through
    their maxima. The loss is the divergence from the unrounded model's predictions (KL, or the relative squared error of outputs that are
    no logits), or block by block the relative squared error of a block's output. What is best on every eighth batch, which is held out, is
    kept.

    Limits: 1. weights are not quantized yet; 2. rotations need norms without gains, and are not learned with `loss="block"`; 3. the loss of
    the whole model keeps its activations in memory; 4. static scales of activations have no clips to learn. Groups that are frozen are
    left, with a note.

    Args:
        parts: what is learned: "scales", "rotations", "clips".
        loss: "model" or "block".
        steps: of the optimizer; for each block with `loss="block"`.
        rate: learning rate.
        rows: samples of a batch in a step.
        clip: ratio that activations start from.
        rotated: learn as if `rotate_channels` with R4 came next.
        seed: of the order of samples.

    Raises:
        DataError: fewer than two batches of calibration data.
        OptionError: nothing is annotated.
    """

    parts: tuple[str, ...] = ("scales", "clips")
    loss: str = "model"
    steps: int = 100
    rate: float = 5e-3
    rows: int = 4
    clip: float = 0.9
    rotated: bool = True
    seed: int = 0
    effect: ClassVar[Effect] = Effect.PRESERVE

    def __post_init__(self) -> None:
        self.take_names("parts", (*MAPS, "clips"))
        if self.loss == "block" and "rotations" in self.parts:
            raise OptionError("rotations of the residual stream span all blocks", where="learn(parts=...)", remedy="set loss='model'")
        if self.loss not in LOSSES:
            raise OptionError(f"there is no loss {self.loss!r}", where="learn(loss=...)", remedy=f"there are {list(LOSSES)}")
        if self.steps < 1 or self.rows < 1 or not self.rate > 0 or not 0 < self.clip <= 1:
            raise OptionError("steps and rows are at least 1, rate is positive, clip a ratio above 0 and up to 1", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Batches to learn from, and one to hold out."""
        needs_two(ctx, self.name())

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Annotations."""
        if not any(layer.site("weight").encoding for layer in layers(gm)):
            raise OptionError("learn needs annotated layers", remedy="put annotate before learn")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, then apply the maps and annotate the clips; returns the number of groups and inputs changed."""
        inputs, left = online_inputs(gm, channel_groups(gm, Map.ROTATE)) if self.rotated else ({}, {})
        ctx.notes += [f"learn: left out the rotation of what {path} reads: {reason}" for path, reason in left.items()]
        online = {source: hadamard.largest_block(edit.value(source).shape[-1]) for source in inputs}
        groups = [group for part, kind in MAPS.items() if part in self.parts for group in _groups(gm, ctx, kind)]
        student = Student(gm, groups, online, self.clip if "clips" in self.parts else None)
        with torch.enable_grad():
            LOSSES[self.loss](self, gm, ctx, student)
        with torch.no_grad():
            student.maps.double()
            matrices = [student.matrix(index) for index in range(len(groups))]
        for group, M in zip(groups, matrices, strict=True):
            maps.apply(gm, group, M)
        read = readers(gm)
        for source, parameter in student.input_clips.items():
            for layer in read[source]:
                encoding = layer.site("input").encoding
                if encoding is not None and encoding.dynamic:
                    layer.site("input").annotate(replace(encoding, clip=max(0.01, float(ratio(parameter.detach())))))
        return len(groups) + len(student.input_clips)


def _groups(gm: GraphModule, ctx: Context, kind: Map) -> list[ChannelGroup]:
    """The groups that linears of the recipe read and stored tensors make; those that are frozen are noted."""
    counted = {layer.weight: layer.path for layer in chosen(gm)}
    found = []
    for group in channel_groups(gm, kind):
        paths = [counted[member.node] for member in group.readers if member.node in counted]
        if paths and group.reason:
            ctx.notes.append(f"learn: left out the channels that {paths[0]} reads ({kind.value}): {group.reason}")
        elif paths and group.writers:
            found.append(group)
    return found


def _learn_model(recipe: Learn, gm: GraphModule, ctx: Context, student: Student) -> None:
    """One loss, of the model's own outputs."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    outputs = own_outputs(gm)

    def loss(batch: Sequence[Tensor]) -> Tensor:
        given = evaluate.bind(gm, batch)
        exact = evaluate.evaluate(gm, nodes, given, list(outputs))
        found = student.run(nodes, given, list(outputs), student.tensors())
        return of_outputs(found, exact, outputs)

    train, held = split([list(batch) for batch in ctx.calibration])
    samples = (some_rows(batch, recipe.rows, generator) for batch, generator in shuffled(train, recipe.seed))
    _descend(recipe, ctx, student.parameters(), loss, samples, held, "learn")


def _learn_blocks(recipe: Learn, gm: GraphModule, ctx: Context, student: Student) -> None:
    """Block after block, the error of what it gives to the next; the inputs come from the prefix as it was learned."""
    outside, cut = blocks(gm)
    bound = [evaluate.bind(gm, batch) for batch in ctx.calibration]
    exact, rounded = bound, bound
    for number, block in enumerate(cut):
        keep = block.exit or tuple(node for node in own_outputs(gm) if node in block.nodes)
        nodes = [*outside, *block.nodes]
        targets = [evaluate.evaluate(gm, _needed(nodes, keep, given), given, keep) for given in exact]
        imitation = _Imitation(student, nodes, keep, rounded, targets, student.within(set(block.nodes)))
        train, held = split(range(len(bound)))
        samples = (index for index, _ in shuffled(train, recipe.seed))
        doing = f"learn block {number + 1} of {len(cut)}"
        _descend(recipe, ctx, _parameters_of(student, block), imitation.loss, samples, held, doing)
        with torch.no_grad():
            rounded = [given | imitation.run(index) for index, given in enumerate(bound)]
        exact = [given | target for given, target in zip(bound, targets, strict=True)]


def _descend(
    recipe: Learn,
    ctx: Context,
    parameters: Iterable[nn.Parameter],
    loss: Loss[T],
    samples: Iterator[T],
    held: Sequence[T],
    doing: str,
) -> None:
    learned, steps = list(parameters), partial(ctx.memo.steps, ctx, range(recipe.steps), doing)
    descent = partial(descend, learned, loss, samples, held, rate=recipe.rate, steps=steps, count=recipe.steps)
    ctx.memo.filled(doing, learned, descent)


@dataclass(frozen=True)
class _Imitation:
    """One block: what enters it for each batch, what it should give, and the groups that act on it."""

    student: Student
    nodes: Sequence[Node]
    keep: Sequence[Node]
    given: Sequence[Values]
    targets: Sequence[Values]
    groups: Sequence[int]

    def run(self, index: int) -> Values:
        """What the student gives for one batch."""
        given = self.given[index]
        return self.student.run(_needed(self.nodes, self.keep, given), given, self.keep, self.student.tensors(self.groups))

    def loss(self, index: int) -> Tensor:
        """Its relative squared error."""
        found = self.run(index)
        return of_outputs(found, self.targets[index], dict.fromkeys(self.keep, ""))


def _needed(nodes: Sequence[Node], keep: Sequence[Node], given: Values) -> list[Node]:
    needed = evaluate.ancestors(keep, stop=given)
    return [node for node in nodes if node in needed]


def _parameters_of(student: Student, block: Block) -> list[nn.Parameter]:
    """The parameters that act within one block alone."""
    own = set(block.nodes)
    found = [
        parameter
        for group, parameter in zip(student.groups, student.maps, strict=True)
        if all(user in own for member in group.members for user in uses(member))
    ]
    found += [parameter for source, parameter in student.input_clips.items() if any(user in own for user in source.users)]
    return found + [parameter for node, parameter in student.weight_clips.items() if node in own]


LOSSES = {"model": _learn_model, "block": _learn_blocks}
