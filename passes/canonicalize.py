"""`canonicalize`: bring a captured graph into normal form."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from ir.canonical import canonicalize
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop what does nothing and raise what models write by hand.

    Before::

        %1 = aten.pow(%x, 2); %2 = aten.mean(%1, [-1], True); %3 = aten.add(%2, 1e-06)
        %4 = aten.rsqrt(%3); %5 = aten.mul(%x, %4); %6 = aten.mul(%weight, %5)

    After::

        %1 = aten.rms_norm(%x, [64], %weight, 1e-06)

    Law: the function is kept up to rounding. How many of each rewrite were made is noted in the report.
    """

    effect: ClassVar[Effect] = Effect.PRESERVE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Apply every rewrite of `ir.canonical` until none applies."""
        made = canonicalize(gm)
        ctx.notes.append("canonicalize: " + (", ".join(f"{name} × {count}" for name, count in made.items() if count) or "nothing to do"))
        return sum(made.values())
