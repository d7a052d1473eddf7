"""`observe`: one calibration run that measures what every layer reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch.fx import GraphModule

from ir import edit
from ir.errors import DataError
from ir.sites import readers
from ir.statistics import Statistics
from passes.base import Context, Effect, Pass
from passes.data.observation import observed


@dataclass(frozen=True)
class Observe(Pass):
    """Measure the inputs of all linears in one streaming run over the calibration data: extremes, moments, quantile sketches.

    Args:
        gram: keep the Gram matrix `XᵀX` of every input too (K² numbers a layer).
        file: load the statistics from this safetensors file if it exists, else write them there.

    Memory does not grow with the number of samples: one batch's live values, and the statistics, whose size is fixed.

    Raises:
        DataError: no calibration data, or values that are not finite.
    """

    gram: bool = False
    file: str = ""
    effect: ClassVar[Effect] = Effect.OBSERVE
    files: ClassVar[tuple[str, ...]] = ("file",)

    def needs(self, ctx: Context) -> None:
        """Calibration data, or a file of statistics."""
        if not (self.file and Path(self.file).exists()):
            self.need_calibration(ctx)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Fill `ctx.statistics`; keys are the paths of the first layers that read each tensor."""
        sources = {source: found[0].path for source, found in readers(gm).items()}
        if self.file and ctx.ranks.told(Path(self.file).exists):
            loaded = Statistics.load(Path(self.file))
            for source, path in sources.items():
                found = loaded.get(path)
                if found is None or found.channels != edit.value(source).shape[-1] or (self.gram and found.gram is None):
                    raise DataError(
                        f"the statistics have no entry for {path!r} that fits", where=self.file, remedy="remove the file to measure anew"
                    )
            ctx.statistics = loaded
            return len(loaded)
        ctx.statistics = observed(gm, ctx, gram=self.gram)
        if self.file and ctx.ranks.first:
            ctx.statistics.save(Path(self.file))
        return len(ctx.statistics)
