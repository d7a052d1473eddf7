"""`learn`: scales, rotations and clipping ratios by gradient, through the rounding that comes after."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ir import edit, evaluate, hadamard, maps
from ir.blocks import Block, blocks
from ir.channels import ChannelGroup, Map, channel_groups
from ir.errors import DataError, OptionError
from ir.online import online_inputs
from ir.sites import layers
from passes.base import Context, Effect, Pass
from passes.student import Start, Student, Values, clip

PARTS = ("scales", "rotations", "clips")
LOSSES = ("model", "block")
WARM_UP = 10


@dataclass(frozen=True)
class Learn(Pass):
    """Learn maps of channels, and clipping ratios, through the rounding of annotated operands.

    Before::

        %1 = aten.rms_norm(%x, [64], None); %2 = aten.linear(%1, %q) {input: i4[1,-1]dynamic, weight: i4[1,-1]}

    After::

        %1 = aten.rms_norm(%x, [64], %1_over_s); %2 = aten.linear(%1, %q_s) {input: i4[1,-1]dynamic*0.87, weight: i4[1,-1]}

    Law: as `smooth_channels` and `rotate_channels`; what is learned are the maps, which keep the function, and the clips, which are annotations. Weights are
    rounded to nearest while learning; `round_weights` then chooses their integers, and the clips of their scales, anew.

    Scales (T1 to T3 of 2606.09927, over all linears), rotations (R1 and R2, after SpinQuant 2405.16406) and clips (after OmniQuant
    2308.13137) are learned together by Adam with a cosine schedule, straight-through rounding, and dynamic scales differentiated through
    their maxima. The loss is the divergence from the unrounded model's predictions (KL, or the relative squared error of outputs that
    are no logits), or block by block the relative squared error of a block's output. What is best on every eighth batch, which is held out,
    is kept.

    Limits: 1. weights are not quantized yet; 2. rotations need norms without gains, and are not learned with `loss="block"`; 3. the loss of
    the whole model keeps its activations in memory. Groups that are frozen are left, as `smooth_channels` and `rotate_channels` note.

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
        parts = (self.parts,) if isinstance(self.parts, str) else tuple(self.parts)
        object.__setattr__(self, "parts", parts)
        if not parts or set(parts) - set(PARTS):
            raise OptionError(f"{list(parts)} cannot be learned", where="learn(parts=...)", remedy=f"there are {list(PARTS)}")
        if self.loss not in LOSSES:
            raise OptionError(f"there is no loss {self.loss!r}", where="learn(loss=...)", remedy=f"there are {list(LOSSES)}")
        if self.steps < 1 or self.rows < 1 or not self.rate > 0 or not 0 < self.clip <= 1:
            raise OptionError("steps and rows are at least 1, rate is positive, clip a ratio above 0 and up to 1", where=str(self))

    def needs(self, ctx: Context) -> None:
        """Batches to learn from, and one to hold out."""
        if len(ctx.calibration) < 2:
            raise DataError(
                f"learn needs two batches of calibration data, not {len(ctx.calibration)}", remedy="split the data in more batches"
            )

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Annotations."""
        if not any(layer.site("weight").encoding for layer in layers(gm)):
            raise OptionError("learn needs annotated layers", remedy="put annotate before learn")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Learn, then apply the maps and annotate the clips; returns the number of groups and inputs changed."""
        rotations = channel_groups(gm, Map.ROTATE)
        inputs = online_inputs(gm, rotations) if self.rotated else {}
        online = {source: hadamard.largest_block(edit.value(source).shape[-1]) for source in inputs}
        groups = [group for group in rotations if "rotations" in self.parts and self.loss == "model" and _learnable(group)]
        groups += [group for group in channel_groups(gm, Map.SCALE) if "scales" in self.parts and _learnable(group)]
        student = Student(gm, groups, online, Start(self.clip, clips="clips" in self.parts))
        with torch.enable_grad():
            (_learn_model if self.loss == "model" else _learn_blocks)(self, gm, ctx, student)
        with torch.no_grad():
            student.maps.double()
            matrices = [student.matrix(index) for index in range(len(groups))]
        for group, M in zip(groups, matrices, strict=True):
            maps.apply(gm, group, M)
        for source, parameter in student.input_clips.items():
            for user in [layer for layer in layers(gm) if layer.kind == "Linear" and layer.site("input").operand is source]:
                encoding = user.site("input").encoding
                if encoding is not None and encoding.dynamic:
                    user.site("input").annotate(replace(encoding, clip=max(0.01, float(clip(parameter.detach())))))
        return len(groups) + len(student.input_clips)


def _learnable(group: ChannelGroup) -> bool:
    return not group.reason and bool(group.readers) and bool(group.writers)


def _learn_model(recipe: Learn, gm: GraphModule, ctx: Context, student: Student) -> None:
    """One loss, of the model's own outputs."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    outputs = [node for node in _own_outputs(gm) if node.op == "call_function"]

    def loss(batch: Sequence[Tensor]) -> Tensor:
        given = evaluate.bind(gm, batch)
        with torch.no_grad():
            exact = evaluate.evaluate(gm, nodes, given, outputs)
        found = student.run(nodes, given, outputs, student.tensors())
        return torch.stack([_distance(found[node], exact[node], logits=_is_logits(gm, node)) for node in outputs]).sum()

    train, held = _split(ctx.calibration)
    parameters = [*student.maps, *student.input_clips.values(), *student.weight_clips.values()]
    _descend(recipe, ctx, parameters, loss, train, held, "learn")


def _learn_blocks(recipe: Learn, gm: GraphModule, ctx: Context, student: Student) -> None:
    """Block after block, the error of what it gives to the next; the inputs come from the prefix as it was learned."""
    outside, cut = blocks(gm)
    empty: list[Values] = [{} for _ in ctx.calibration]
    exact, rounded = list(empty), list(empty)
    for number, block in enumerate(cut):
        nodes = [*outside, *block.nodes]
        last = block.exit or tuple(node for node in _own_outputs(gm) if node in block.nodes)
        bound = [evaluate.bind(gm, batch) for batch in ctx.calibration]
        with torch.no_grad():
            target = [evaluate.evaluate(gm, _needed(nodes, last, b | e), b | e, last) for b, e in zip(bound, exact, strict=True)]

        def loss(index: int, nodes: list[Node] = nodes, last: Sequence[Node] = last, target: list[Values] = target) -> Tensor:
            given = evaluate.bind(gm, ctx.calibration[index]) | rounded[index]
            found = student.run(_needed(nodes, last, given), given, last, student.tensors())
            return torch.stack([_distance(found[node], target[index][node]) for node in last]).sum()

        parameters = _parameters_of(student, block)
        train, held = _split(range(len(ctx.calibration)))
        if parameters:
            _descend(recipe, ctx, parameters, loss, train, held, f"learn block {number + 1} of {len(cut)}")
        with torch.no_grad():
            tensors = student.tensors()
            given = [b | r for b, r in zip(bound, rounded, strict=True)]
            rounded = [student.run(_needed(nodes, last, g), g, last, tensors) for g in given]
        exact = target


def _needed(nodes: Sequence[Node], keep: Sequence[Node], given: Values) -> list[Node]:
    needed = evaluate.ancestors(keep, stop=given)
    return [node for node in nodes if node in needed]


def _parameters_of(student: Student, block: Block) -> list[nn.Parameter]:
    """The parameters that act within one block alone."""
    own = set(block.nodes)
    found = [
        parameter
        for group, parameter in zip(student.groups, student.maps, strict=True)
        if all(user in own for member in group.members for user in (member.node.users if member.node.op == "get_attr" else [member.node]))
    ]
    found += [parameter for source, parameter in student.input_clips.items() if any(user in own for user in source.users)]
    return found + [parameter for node, parameter in student.weight_clips.items() if node in own]


def _descend(recipe: Learn, ctx: Context, parameters: list, loss, train: list, held: list, doing: str) -> None:  # type: ignore[no-untyped-def,type-arg]
    """Adam with warm-up and cosine decay; the parameters end at the best of the start and the later looks at what is held out."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(wanted, lr=recipe.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe.steps))
    best, kept = _held(loss, held), [parameter.detach().clone() for parameter in wanted]
    looks = {*range(recipe.steps // 4, recipe.steps, max(recipe.steps // 4, 1)), recipe.steps}
    samples = _samples(train, recipe)
    for step in ctx.track(range(1, recipe.steps + 1), doing):
        optimizer.zero_grad()
        loss(next(samples)).backward()
        optimizer.step()
        schedule.step()
        if step in looks and (found := _held(loss, held)) < best:
            best, kept = found, [parameter.detach().clone() for parameter in wanted]
    with torch.no_grad():
        for parameter, value in zip(wanted, kept, strict=True):
            parameter.copy_(value)


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.no_grad()
def _held(loss, held: list) -> float:  # type: ignore[no-untyped-def,type-arg]
    found = float(torch.stack([loss(item) for item in held]).mean())
    return found if math.isfinite(found) else math.inf


def _split(items: Sequence) -> tuple[list, list]:  # type: ignore[type-arg]
    """What is learned from, and every eighth item, or the last, which is held out."""
    held = list(items[7::8]) or [items[-1]]
    places = set(range(7, len(items), 8)) or {len(items) - 1}
    return [item for place, item in enumerate(items) if place not in places], held


def _samples(items: list, recipe: Learn) -> Iterator:  # type: ignore[type-arg]
    """Random samples without end: some rows of a batch, or a batch by its number."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            item = items[index]
            if isinstance(item, int):
                yield item
                continue
            size = item[0].shape[0]
            rows = torch.randperm(size, generator=generator)[: recipe.rows]
            yield [value[rows] if value.ndim and value.shape[0] == size else value for value in item]


def _own_outputs(gm: GraphModule) -> list[Node]:
    """The floating-point outputs that are the model's own."""
    signature = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    names = [port.name for port in signature.outputs] if signature else [""] * len(nodes)
    return [
        node for node, name in zip(nodes, names, strict=True) if not name.startswith("present.") and edit.value(node).is_floating_point()
    ]


def _is_logits(gm: GraphModule, node: Node) -> bool:
    signature = gm.meta.get("signature")
    nodes: tuple[Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    return signature is not None and any(
        port.name == "logits" and found is node for port, found in zip(signature.outputs, nodes, strict=True)
    )


def _distance(found: Tensor, exact: Tensor, *, logits: bool = False) -> Tensor:
    """KL(exact ‖ found) per token, in nats; or ‖found − exact‖² / ‖exact‖²."""
    if logits:
        p, q = exact.float().log_softmax(-1), found.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()
    return (found - exact).square().sum() / exact.square().sum().clamp_min(1e-12)
