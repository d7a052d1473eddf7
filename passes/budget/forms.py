"""`Form`: what a linear may become, its encodings and its size; and which of its rows and columns a smaller one keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from ir import edit
from ir.encoding import Encoding
from ir.sites import Layer, Mark

Shape = tuple[int, int]


class Form(NamedTuple):
    """The encodings of a linear's operands, and the shape of its weight where units of channels are dropped, None for all of it.

    Text form: the mark's, and the shape if there is one: `u4[1,64] 352x256`.
    """

    input: Encoding | None
    weight: Encoding
    shape: Shape | None = None

    def __str__(self) -> str:
        return str(self.mark) if self.shape is None else f"{self.mark} {self.shape[0]}x{self.shape[1]}"

    @property
    def mark(self) -> Mark:
        """The encodings alone."""
        return Mark(self.input, self.weight)

    def shape_of(self, layer: Layer) -> Shape:
        """The shape of a layer's weight in this form."""
        rows, columns = self.shape or edit.value(layer.weight).shape
        return int(rows), int(columns)

    @classmethod
    def parse(cls, text: str) -> "Form":
        """The form that `text` states; the exact inverse of `str`.

        Raises:
            OptionError: `text` is none.
        """
        mark, _, shape = text.partition(" ")
        rows, _, columns = shape.partition("x")
        return cls(*Mark.parse(mark), (int(rows), int(columns)) if shape else None)


Site = Sequence[Layer]  # linears that share a choice
Forms = tuple[Form, ...]  # one for each layer of a site


@dataclass(frozen=True)
class Cuts:
    """What of linears stays at each size: which units go first is one order, so the size says which.

    Args:
        kept: by linear, axis of its weight and size along it, what stays, bool; nothing of what stays whole.
        damping: of the refit, as of `ir.refit`.
    """

    kept: Mapping[tuple[Node, int, int], Tensor] = field(default_factory=dict)
    damping: float = 0.01

    def rows(self, layer: Layer, form: Form) -> Tensor | None:
        """The rows that stay, None for all."""
        return self.kept.get((layer.node, 0, form.shape[0])) if form.shape else None

    def columns(self, layer: Layer, form: Form) -> Tensor | None:
        """The columns that stay, None for all."""
        return self.kept.get((layer.node, 1, form.shape[1])) if form.shape else None


WHOLE = Cuts()
