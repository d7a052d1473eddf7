"""`annotate`: decide which layers are quantized, and how."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from ir import edit
from ir.encoding import Encoding, Int
from ir.errors import CoverageError, OptionError
from ir.schemes import FLOAT, SCHEMES, bits_of
from ir.sites import Layer, check_patterns, heads, layers, matches
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class Annotate(Pass):
    """Mark the operands of matching layers with the encodings of a scheme.

    Before::

        %2 = aten.linear(%1, %w)

    After::

        %2 = aten.linear(%1, %w) {input: i8[1,-1]dynamic, weight: i8[1,-1]}

    Args:
        scheme: bits of weights and of activations, such as W8A8, W4A16 or W4A4; see `ir.schemes`.
        group: weights along the input axis that share a scale; -1 for one scale per output channel.
        symmetric: weights without a zero point.
        dynamic: activations get a scale per token at run time; else one per tensor, from `observe`.
        targets: layers to quantize: class names, paths, last components of paths, or `re:` and a regular expression.
        ignore: layers to leave out, in the same language.
        head: quantize output heads too.
        embeddings: quantize embeddings too, with `bits` of the weights, one scale per row; one that is tied to a quantized head exactly
            as the head, so that both can share codes.

    Raises:
        OptionError: an unknown scheme, or a pattern that matches nothing.
        CoverageError: no layer is left to quantize.
    """

    scheme: str = "W8A8"
    group: int = -1
    symmetric: bool = True
    dynamic: bool = True
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    head: bool = False
    embeddings: bool = False
    effect: ClassVar[Effect] = Effect.ANNOTATE

    def __post_init__(self) -> None:
        bits_of(self.scheme, "annotate(scheme=...)")
        if self.group != -1 and self.group < 1:
            raise OptionError(
                f"a group has at least one weight, or -1 for the whole channel, not {self.group}", where="annotate(group=...)"
            )
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
                raise OptionError(f"{name} is a list of strings, not {value!r}", where="annotate")
            object.__setattr__(self, name, tuple(value))
        self.weights, self.activations  # noqa: B018 (refuse impossible encodings now)

    @property
    def weights(self) -> Encoding:
        """The encoding of weights."""
        return Encoding(Int(SCHEMES[self.scheme][0]), (1, self.group), symmetric=self.symmetric)

    @property
    def activations(self) -> Encoding | None:
        """The encoding of activations; None if they stay in floating point."""
        bits = SCHEMES[self.scheme][1]
        if bits == FLOAT:
            return None
        return Encoding(Int(bits), (1, -1), dynamic=True) if self.dynamic else Encoding(Int(bits), (-1,), symmetric=False)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """Patterns that match, and a layer to quantize."""
        if ctx.part:
            return
        known = layers(gm)
        check_patterns(self.targets, known, "annotate(targets=...)")
        check_patterns(self.ignore, known, "annotate(ignore=...)")
        reasons = sorted({reason for _, reason in self._decisions(gm) if reason is not None})
        if all(reason is not None for _, reason in self._decisions(gm)):
            raise CoverageError(f"{self} would cover nothing: {'; '.join(reasons)}", remedy="widen targets, or narrow ignore")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Annotate, and record what is left out."""
        covered = 0
        decisions = list(self._decisions(gm))
        linears = {layer.weight for layer, reason in decisions if layer.kind == "Linear" and reason is None}
        for layer, reason in decisions:
            if reason is not None:
                if layer.site("weight").encoding is None:  # else an earlier pass has annotated it
                    ctx.skip(layer.path, reason, _size(gm, layer))
                continue
            alone = layer.kind == "Embedding" and layer.weight not in linears
            layer.site("weight").annotate(self._row_encoding if alone else self.weights)
            if layer.kind == "Linear":
                layer.site("input").annotate(self.activations)
            covered += 1
        return covered

    @property
    def _row_encoding(self) -> Encoding:
        return Encoding(self.weights.format, (1, -1), symmetric=self.symmetric)

    def _decisions(self, gm: GraphModule) -> Iterator[tuple[Layer, str | None]]:
        """Every layer, and why it is left out (None if it is quantized)."""
        outputs = heads(gm)
        for layer in layers(gm):
            yield layer, self._reason(layer, layer.node in outputs)

    def _reason(self, layer: Layer, head: bool) -> str | None:
        if any(matches(layer, pattern) for pattern in self.ignore):
            return "ignored by the recipe"
        if layer.kind == "Embedding" and not self.embeddings:
            return "embeddings are left out by default (embeddings=True takes them in)"
        if layer.kind == "Linear" and head and not self.head:
            return "output heads are left out by default (head=True takes them in)"
        if layer.kind != "Embedding" and not any(matches(layer, pattern) for pattern in self.targets):
            return "not among the targets of the recipe"
        return None


def _size(gm: GraphModule, layer: Layer) -> int:
    fake = edit.value(layer.weight)
    return int(fake.numel()) * int(fake.dtype.itemsize)
