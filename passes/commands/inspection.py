"""What a pipeline would cover, before any weight is changed: groups of layers, blocks, shares of weight bytes and reasons."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from rich.console import RenderableType
from rich.table import Table
from torch import nn
from torch.fx import GraphModule

from ir import edit
from ir.blocks import blocks
from ir.capture import capture
from ir.sites import Layer, layers, readers
from passes.base import Context, Effect
from passes.pipeline import Pipeline


@dataclass(frozen=True)
class Share:
    """The weight bytes that share a fate."""

    fate: str
    layers: int
    bytes: int


def prefix(pipeline: Pipeline) -> Pipeline:
    """A pipeline up to its last pass that annotates; without one, its leading passes that keep the function."""
    last = max((i for i, step in enumerate(pipeline) if step.effect is Effect.ANNOTATE), default=-1)
    if last >= 0:
        return Pipeline(pipeline.passes[: last + 1])
    return Pipeline(tuple(takewhile(lambda step: step.effect is Effect.PRESERVE, pipeline)))


def annotated(model: nn.Module, pipeline: Pipeline, ctx: Context) -> GraphModule:
    """The captured graph of a model after the part of a pipeline that annotates it."""
    gm = capture(model)
    ctx.probe = gm.meta["example"]
    prefix(pipeline).execute(gm, ctx)
    return gm


def shares(gm: GraphModule, ctx: Context) -> list[Share]:
    """Weight bytes by what becomes of them, greatest first. A tensor that two layers read counts once."""
    reasons = {skip.path: skip.reason for skip in ctx.skipped}
    fates: dict[str, list[int]] = {}
    seen: set[int] = set()
    for layer in layers(gm):
        encoding = layer.site("weight").encoding
        fate = f"weights as {encoding}{_input(layer)}" if encoding else f"left: {reasons.get(layer.path, 'not annotated')}"
        tensor = edit.attribute(gm, layer.weight)
        fates.setdefault(fate, []).append(0 if tensor.data_ptr() in seen else tensor.nbytes)
        seen.add(tensor.data_ptr())
    others = [tensor for tensor in {t.data_ptr(): t for t in [*gm.parameters(), *gm.buffers()]}.values() if tensor.data_ptr() not in seen]
    found = [Share(fate, len(sizes), sum(sizes)) for fate, sizes in fates.items()]
    found.append(Share("left: parameters of other operators", 0, sum(tensor.nbytes for tensor in others)))
    return sorted(found, key=lambda share: -share.bytes)


def tables(gm: GraphModule, ctx: Context) -> Iterator[RenderableType]:
    """The pages that `fxpress inspect` prints."""
    yield _groups(gm)
    yield _blocks(gm)
    yield _shares(gm, ctx)


def _groups(gm: GraphModule) -> Table:
    table = Table("in", "layers", "inputs", "outputs", "encodings", title="Layers by the tensor they read", title_justify="left")
    for found in readers(gm).values():
        paths = [layer.path for layer in found]
        parents = {path.rpartition(".")[0] for path in paths}
        shared = parents.pop() if len(parents) == 1 else ""
        names = ", ".join(path.removeprefix(f"{shared}.") for path in paths)
        shapes = [edit.value(layer.weight).shape for layer in found]
        marks = dict.fromkeys(f"{layer.site('weight').encoding or '-'}{_input(layer)}" for layer in found)
        table.add_row(shared, names, str(shapes[0][1]), ", ".join(str(shape[0]) for shape in shapes), ", ".join(marks))
    return table


def _blocks(gm: GraphModule) -> Table:
    outside, cut = blocks(gm)
    names = {layer.node: layer.path for layer in layers(gm)}
    title = f"{len(cut)} blocks, cut at the residual stream ({len(outside)} nodes lie outside of it)"
    table = Table("block", "nodes", "layers", "passed on", title=title, title_justify="left")
    for index, block in enumerate(cut):
        inner = ", ".join(names[node] for node in block.nodes if node in names)
        table.add_row(str(index), str(len(block.nodes)), inner, str(len(block.exit)))
    return table


def _shares(gm: GraphModule, ctx: Context) -> Table:
    found = shares(gm, ctx)
    total = max(sum(share.bytes for share in found), 1)
    table = Table("weight bytes", "layers", "MB", "share", title="Coverage", title_justify="left")
    for share in found:
        table.add_row(share.fate, str(share.layers or ""), f"{share.bytes / 1e6:.2f}", f"{share.bytes / total:.1%}")
    return table


def _input(layer: Layer) -> str:
    encoding = layer.site("input").encoding if layer.kind == "Linear" else None
    return f", inputs as {encoding}" if encoding else ""
