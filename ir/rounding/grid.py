"""`Grid`: the values that a weight can take, and how scales are chosen; `Draft`: codes and parameters while both are being chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding, Float
from ir.numerics import QParams

SCALE_DTYPE = torch.float16  # scales of weights are stored, and counted, in 16 bits
RATIOS = tuple(1 - 0.025 * i for i in range(25))  # clipping ratios that are tried, 1 to 0.4; two bits use the least of them


@dataclass(frozen=True)
class Grid:
    """All codes of an encoding, with scales that cover the extremes or, with `search`, by `search_qparams`."""

    encoding: Encoding
    search: bool = False

    def choose(self, W: Tensor, importance: Tensor) -> QParams:
        """Parameters of the blocks of `W [N, columns]`; `importance [columns]` weighs squared errors."""
        return search_qparams(W, self.encoding, importance) if self.search else numerics.choose_qparams(W, self.encoding, SCALE_DTYPE)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The codes nearest to `x`, as `numerics.nearest`."""
        return numerics.nearest(x, scale, zero_point, self.encoding)


def search_qparams(W: Tensor, encoding: Encoding, importance: Tensor) -> QParams:
    """Parameters, per block of `W [N, K]`, of the clipping ratio in `RATIOS` with the least `Σ importance · (w − ŵ)²`.

    The extremes' own are among those tried; one bit and floats, which gain nothing by clipping, keep them. `importance` is `[K]`, ≥ 0.
    """
    if encoding.bits == 1 or isinstance(encoding.format, Float):
        return numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    split, axes = numerics.blocked(W, encoding)
    weights, _ = numerics.blocked(importance.expand_as(W), encoding)
    low, high = split.amin(axes).clamp_max(0), split.amax(axes).clamp_min(0)

    def error(qparams: QParams) -> Tensor:
        scale, z = (None if own is None else own.to(W.dtype)[:, None, :, None] for own in (qparams.scale, qparams.zero_point))
        assert scale is not None
        rounded = numerics.restored(numerics.nearest(split, scale, z, encoding), scale, z)
        return rounded.sub_(split).square_().mul_(weights).sum(axes)

    best = numerics.qparams_from_range(low, high, encoding, SCALE_DTYPE)
    least = error(best)
    for ratio in RATIOS[1:]:
        tried = numerics.qparams_from_range(low * ratio, high * ratio, encoding, SCALE_DTYPE)
        found = error(tried)
        better, least = found < least, torch.minimum(found, least)
        z, z_tried = best.zero_point, tried.zero_point
        zero_point = None if z is None or z_tried is None else torch.where(better, z_tried, z)
        best = QParams(torch.where(better, tried.scale, best.scale), zero_point)
    return best


@dataclass
class Draft:
    """Codes `[K, N]`, transposed so that a column of the weight lies together, and parameters, while both are being chosen."""

    grid: Grid
    codes: Tensor
    qparams: QParams

    def __post_init__(self) -> None:
        self.encoding = self.grid.encoding
        self.group = self.encoding.block_shape((self.codes.shape[1], self.codes.shape[0]))[1]
        self.known: dict[int, QParams] = {}

    def set_group(self, group: int, chosen: QParams) -> None:
        """Store the parameters of one group, as chosen from its columns."""
        self.qparams.scale[:, group] = chosen.scale[:, 0]
        if self.qparams.zero_point is not None and chosen.zero_point is not None:
            self.qparams.zero_point[:, group] = chosen.zero_point[:, 0]
        self.known.pop(group, None)

    def set_scale(self, group: int, scale: Tensor) -> None:
        """Store the scales of one group."""
        self.qparams.scale[:, group] = scale
        self.known.pop(group, None)

    def at(self, group: int) -> QParams:
        """The parameters of one group, float32 `[N]` or `[1]`."""
        if group not in self.known:
            rows = (self.codes.shape[1], 1)
            scale, z = (
                None if own is None else numerics.expand(own[:, group, None], self.encoding, rows)[:, 0].float()
                for own in (self.qparams.scale, self.qparams.zero_point)
            )
            assert scale is not None
            self.known = {group: QParams(scale, z)}
        return self.known[group]

    def round(self, column: int, values: Tensor) -> Tensor:
        """Store the codes of one column's `values [N]`; returns what they stand for."""
        parameters = self.at(column // self.group)
        codes = self.grid.nearest(values, parameters.scale, parameters.zero_point)
        self.codes[column] = codes
        return numerics.restored(codes, parameters.scale, parameters.zero_point)
