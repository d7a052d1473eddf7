"""`untie`: give every reader of a shared weight its own."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from ir import edit
from ir.sites import layers
from passes.base import Context, Effect, Pass


@dataclass(frozen=True)
class Untie(Pass):
    """Split a weight that several layers read, so that a change for one reader leaves the others alone.

    Before::

        %1 = aten.embedding(%embed.weight, %ids) ... %9 = aten.linear(%8, %embed.weight)

    After::

        %1 = aten.embedding(%embed.weight, %ids) ... %9 = aten.linear(%8, %lm_head.weight)

    Law: the function is kept exactly; both nodes read one tensor in memory until a pass replaces one of them.
    """

    effect: ClassVar[Effect] = Effect.PRESERVE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Split every weight with several reading layers."""
        owners: set[int] = set()
        changed = 0
        for layer in layers(gm):
            tensor = edit.attribute(gm, layer.weight)
            if id(tensor) not in owners:
                owners.add(id(tensor))
                continue
            # A parameter object of its own over the same storage: nothing is copied.
            new = edit.add_attribute(gm, f"{layer.path.partition('#')[0]}.weight", tensor.detach(), before=layer.node)
            layer.site("weight").read(new)
            owners.add(id(edit.attribute(gm, new)))
            changed += 1
        return changed
