"""Ask the target about every annotation before any long work starts."""

from torch.fx import GraphModule

from ir import edit
from ir.errors import CoverageError
from ir.sites import QUANTIZABLE, Layer, layers
from passes.backend import Surveyor
from passes.base import Context


def refuse_unsupported(gm: GraphModule, ctx: Context) -> None:
    """Check every annotated layer with the backend, then the graph as a whole.

    Raises:
        CoverageError: layers that the backend cannot run as annotated. With `ctx.allow_partial` they lose their annotations instead, and
            the report says so.
        BackendError: the graph as a whole has no place in what the backend makes.
    """
    if ctx.backend is None:
        return
    refused: list[tuple[Layer, str]] = []
    for layer in layers(gm):
        marks = {name: layer.site(name).encoding for name in QUANTIZABLE[layer.node.target][1]}
        encodings = {name: encoding for name, encoding in marks.items() if encoding is not None}
        reason = ctx.backend.supports(layer.kind, encodings, tuple(edit.value(layer.weight).shape)) if encodings else None
        if reason is not None:
            refused.append((layer, reason))
    if refused and not ctx.allow_partial:
        layer, reason = refused[0]
        others = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise CoverageError(
            f"the {ctx.backend.name} backend cannot run {layer.path} as annotated{others}: {reason}",
            where=layer.path,
            remedy="another scheme or group, ignore the layers, or allow_partial=True to leave them as they are",
        )
    for layer, reason in refused:
        for name in QUANTIZABLE[layer.node.target][1]:
            layer.site(name).annotate(None)
        fake = edit.value(layer.weight)
        ctx.skip(layer.path, reason, int(fake.numel()) * int(fake.dtype.itemsize), asked=True)
    if isinstance(ctx.backend, Surveyor):
        ctx.backend.survey(gm)
