"""What calibration keeps of the inputs of a site: extremes, moments, quantiles, Gram matrix; streamed, merged, stored and reloaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ir.errors import DataError
from ir.files import appearing
from ir.sketch import QuantileSketch

FORMAT = {"format": "fxpress-statistics", "version": "2"}
_CHUNK = 1 << 22  # elements taken to float64 at once


@dataclass
class TensorStatistics:
    """Statistics of one tensor `x [tokens, channels]`, of a size that does not depend on the number of tokens.

    Bytes a channel: 24, with a sketch 1568, with a Gram matrix 4 · channels more.

    Args:
        count: tokens seen.
        minimum: least value per channel, in float32 `[channels]`; infinite before the first token.
        maximum: greatest value, likewise.
        mean: first moment, float64 `[channels]`.
        deviation: Σ (x − mean)², float64 `[channels]`, merged by the formula of Chan, Golub and LeVeque (1979), stable for any mean.
        sketch: quantiles of |x|, if kept.
        gram: Σ xᵀx, if kept, float32 `[channels, channels]`: its error of about 1e-6 is far below the damping of every use.
    """

    count: int
    minimum: Tensor
    maximum: Tensor
    mean: Tensor
    deviation: Tensor
    sketch: QuantileSketch | None = None
    gram: Tensor | None = None

    @classmethod
    def empty(cls, channels: int, *, sketch: bool = True, gram: bool = False, device: torch.device | str = "cpu") -> "TensorStatistics":
        """The statistics of no tokens, which keep a sketch and a Gram matrix if told so."""
        infinite = torch.full((channels,), torch.inf, device=device)
        zero = torch.zeros(channels, dtype=torch.float64, device=device)
        quantiles = QuantileSketch.empty(channels, device) if sketch else None
        square = torch.zeros(channels, channels, device=device) if gram else None
        return cls(0, infinite, -infinite, zero, zero.clone(), quantiles, square)

    @property
    def channels(self) -> int:
        """Length of the last axis."""
        return len(self.mean)

    @property
    def absmax(self) -> Tensor:
        """Greatest |x| per channel, float32 `[channels]`; zero before the first token."""
        return torch.maximum(-self.minimum, self.maximum).clamp_min(0)

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value of the whole tensor."""
        return float(self.minimum.amin()), float(self.maximum.amax())

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean, float64 `[channels]`."""
        return self.deviation / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """Mean of x², float64 `[channels]`: the Gram matrix's diagonal over `count`."""
        return self.variance + self.mean.square()

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in `x [..., channels]`, floating point, in place.

        Raises:
            DataError: another number of channels, NaN or infinity; nothing of `x` is counted then.
        """
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise DataError(f"statistics of {self.channels} channels cannot take in a tensor of shape {list(x.shape)}")
        x = x.detach().reshape(-1, self.channels)
        x = x if x.dtype == torch.float64 else x.float()
        if not torch.isfinite(x).all():
            raise DataError("the calibration input is not finite", remedy="look at the model or batch that makes NaN or infinity here")
        if len(x) == 0:
            return
        if self.sketch is not None:
            self.sketch.update(x)
        for chunk in torch.split(x, max(1, _CHUNK // max(self.channels, 1))):
            self._accumulate(chunk)

    def _accumulate(self, x: Tensor) -> None:
        """Add moments, extremes and Gram matrix of `x [tokens > 0, channels]`."""
        mean = x.mean(0, dtype=torch.float64)
        deviation = (x - mean).square().sum(0)
        self.mean, self.deviation = _combine(self, replace(self, count=len(x), mean=mean, deviation=deviation))
        self.count += len(x)
        self.minimum = torch.minimum(self.minimum, x.amin(0).float())
        self.maximum = torch.maximum(self.maximum, x.amax(0).float())
        if self.gram is not None:
            self.gram.add_((x.T @ x).float())

    def merge(self, other: "TensorStatistics") -> "TensorStatistics":
        """The statistics of both sets of tokens; order matters only by the rounding of moments and Gram matrix.

        Raises:
            DataError: the two differ in channels or in what they keep.
        """
        if self._layout() != other._layout():
            raise DataError(f"statistics of {self._layout()} and of {other._layout()} cannot be merged")
        mean, deviation = _combine(self, other)
        return TensorStatistics(
            self.count + other.count,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            mean,
            deviation,
            None if self.sketch is None or other.sketch is None else self.sketch.merge(other.sketch),
            None if self.gram is None or other.gram is None else self.gram + other.gram,
        )

    def _layout(self) -> str:
        """What is kept, in words."""
        parts = [f"{self.channels} channels", *(["a sketch"] if self.sketch else []), *(["a Gram matrix"] if self.gram is not None else [])]
        return " with ".join(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by field name."""
        kept = {"count": torch.tensor(self.count), "minimum": self.minimum, "maximum": self.maximum}
        kept |= {"mean": self.mean, "deviation": self.deviation}
        if self.sketch is not None:
            kept |= {"counts": self.sketch.counts, "top": self.sketch.top, "magnitude": self.sketch.maximum}
        return kept if self.gram is None else kept | {"gram": self.gram}

    @classmethod
    def from_tensors(cls, kept: Mapping[str, Tensor]) -> "TensorStatistics":
        """The exact inverse of `tensors`.

        Raises:
            DataError: a tensor is missing, unknown, or of the wrong shape or dtype.
        """
        channels = kept["mean"].numel() if "mean" in kept else 0
        expected = cls.empty(channels, sketch="counts" in kept, gram="gram" in kept, device="meta").tensors()
        if set(kept) != set(expected):
            raise DataError(f"the statistics hold {sorted(kept)}, not {sorted(expected)}")
        for name, like in expected.items():
            if kept[name].shape != like.shape or kept[name].dtype != like.dtype:
                found = f"{kept[name].dtype} {list(kept[name].shape)}"
                raise DataError(f"{name} is {found}, not {like.dtype} {list(like.shape)}")
        count = int(kept["count"])
        finite = ("mean", "deviation", "gram", *(("minimum", "maximum") if count else ()))
        floats = [kept[name] for name in finite if name in kept]
        if count < 0 or not all(torch.isfinite(values).all() for values in floats):
            raise DataError("the statistics hold numbers that no tokens have")
        sketch = QuantileSketch.checked(kept["counts"], kept["top"], kept["magnitude"], count) if "counts" in kept else None
        return cls(count, kept["minimum"], kept["maximum"], kept["mean"], kept["deviation"], sketch, kept.get("gram"))


def _combine(a: TensorStatistics, b: TensorStatistics) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the union of the tokens of `a` and `b`."""
    share = b.count / max(a.count + b.count, 1)
    step = b.mean - a.mean
    return a.mean + step * share, a.deviation + b.deviation + step.square() * (a.count * share)


class Statistics(dict[str, TensorStatistics]):
    """Statistics by the name of the site whose input they describe."""

    def observe(self, site: str, x: Tensor, *, sketch: bool = True, gram: bool = False) -> None:
        """Take in `x [..., channels]` at `site`; the first call for a site decides its channels and what is kept.

        Raises:
            DataError: as `TensorStatistics.update`, naming the site.
        """
        with _at(site):
            channels = x.shape[-1] if x.ndim else 0
            at = self[site] if site in self else TensorStatistics.empty(channels, sketch=sketch, gram=gram, device=x.device)
            at.update(x)
        self[site] = at

    def merge(self, other: "Statistics") -> "Statistics":
        """Both sets of sites; sites in both are merged, the others shared with the result.

        Raises:
            DataError: a site in both differs in channels or in what is kept; names it.
        """
        merged = Statistics({**self, **other})
        for site in self.keys() & other.keys():
            with _at(site):
                merged[site] = self[site].merge(other[site])
        return merged

    def tensors(self) -> dict[str, Tensor]:
        """Everything kept, by site and field name."""
        return {f"{site}/{name}": kept.contiguous() for site, at in self.items() for name, kept in at.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Statistics":
        """The exact inverse of `tensors`.

        Raises:
            DataError: a site is incomplete or misshapen; names it.
        """
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            site, _, name = key.rpartition("/")
            grouped.setdefault(site, {})[name] = tensor
        made = cls()
        for site, kept in grouped.items():
            with _at(site):
                made[site] = TensorStatistics.from_tensors(kept)
        return made

    def save(self, path: Path | str) -> None:
        """Write all sites into one safetensors file; a reader sees the old file or the whole new one, never a part."""
        path = Path(path)
        with appearing(path) as draft:
            save_file(self.tensors(), draft, FORMAT)

    @classmethod
    def load(cls, path: Path | str) -> "Statistics":
        """The statistics that `save` wrote, on the CPU.

        Raises:
            DataError: the file is missing, truncated, of another kind or version, or a site in it is incomplete or misshapen.
        """
        with _at(str(path)):
            tensors = _read(Path(path))
        try:
            return cls.from_tensors(tensors)
        except DataError as error:
            raise DataError(error.what, where=f"{error.where} in {path}", remedy=error.remedy) from error


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of ours."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if file.metadata() != FORMAT:
                raise DataError(f"the file holds {file.metadata()}, not {FORMAT}", remedy="calibrate again with this version")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file is no mapping
    except (OSError, safetensors.SafetensorError) as cause:
        raise DataError(f"the statistics cannot be read: {cause}", remedy="calibrate again") from cause


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Name the place in errors that do not."""
    try:
        yield
    except DataError as error:
        if error.where:
            raise
        raise DataError(error.what, where=where, remedy=error.remedy) from error
