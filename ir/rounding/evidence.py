"""What is known about a layer when its weight is rounded, and the interface of all methods that use it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ir.encoding import Encoding
from ir.errors import DataError
from ir.numerics import QParams

# What each part is called, its shape for a weight [N, K] (None: any size), and where it comes from.
PARTS = {
    "gram": ("the Gram matrix of the layer's inputs", ("K", "K")),
    "cross": ("the cross moment of exact and compressed inputs", ("K", "K")),
    "grams": ("a weighted Gram matrix for each group of the layer's outputs", (None, "K", "K")),
    "outer": ("the Fisher factor of the layer's outputs", ("N", "N")),
    "inner": ("the Fisher factor of the layer's inputs", ("K", "K")),
}


@dataclass(frozen=True, eq=False)
class Evidence:
    """Second moments that methods weigh the error of a weight `[N, K]` by; each is None if it is not known.

    `X̂` are inputs from the compressed prefix, `X` those of the model as it was, on the same tokens. A common factor changes nothing but
    between `gram` and `cross`.

    Args:
        gram: `X̂ᵀX̂ [K, K]`.
        cross: `XᵀX̂ [K, K]`.
        grams: `Σ_t w_tg x̂_t x̂_tᵀ [groups, K, K]`, with weights `w` of tokens for each group g of consecutive outputs.
        outer: `H_out [N, N]` of the Kronecker pair `H_out ⊗ H_in` that approximates the model's Fisher information of the weight.
        inner: `H_in [K, K]`.
    """

    gram: Tensor | None = None
    cross: Tensor | None = None
    grams: Tensor | None = None
    outer: Tensor | None = None
    inner: Tensor | None = None

    def take(self, part: str) -> Tensor:
        """A part that the method has stated a need for."""
        found = getattr(self, part)
        assert isinstance(found, Tensor), part
        return found

    def check(self, method: str, needs: tuple[str, ...], shape: torch.Size) -> None:
        """Refuse what a method cannot use.

        Raises:
            DataError: a part that is missing, not finite, or of the wrong size for a weight of `shape` `[N, K]`.
        """
        sizes = dict(zip("NK", shape, strict=True))
        for part, (noun, form) in PARTS.items():
            value = getattr(self, part)
            if value is None:
                if part in needs:
                    raise DataError(f"{method} needs {noun}", remedy="give calibration text, or round to nearest")
                continue
            wanted = [sizes[axis] if axis else size for axis, size in zip(form, value.shape, strict=False)]
            if value.ndim != len(form) or list(value.shape) != wanted or not torch.isfinite(value).all():
                raise DataError(
                    f"a weight {list(shape)} needs {noun}, finite and of that size, not this {list(value.shape)}", remedy="calibrate again"
                )


NOTHING = Evidence()


@dataclass(frozen=True)
class Rounding(ABC):
    """A method that gives a weight its codes; a frozen dataclass whose fields are its options.

    A method names in `needs` the parts of `Evidence` without which it cannot work, and defines `solve`. What calls it gathers just these.
    It sets `by_rows` if what a row of a weight gets depends on no other row, where these share no scale: several processes may then round
    rows of one weight.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    by_rows: ClassVar[bool] = False

    def round_weight(self, W: Tensor, encoding: Encoding, evidence: Evidence = NOTHING) -> tuple[Tensor, QParams]:
        """Codes `[N, K]` of a weight as `numerics` states them, and their parameters with float16 scales; `W` is not changed.

        Raises:
            DataError: a weight or evidence that is missing, misshapen or not finite.
            OptionError: an encoding that the method has no codes for.
        """
        if W.ndim != 2 or not torch.isfinite(W).all():
            raise DataError(f"a weight to round is a matrix of finite numbers, and this {list(W.shape)} is not")
        evidence.check(type(self).__name__, self.needs, W.shape)
        return self.solve(W.detach().float(), encoding, evidence)

    @abstractmethod
    def solve(self, W: Tensor, encoding: Encoding, evidence: Evidence) -> tuple[Tensor, QParams]:
        """As `round_weight`, of a float32 weight and evidence that are fit for use."""
