"""Schemes: the field's names for the bits of weights and of activations, `W4A8`."""

from dataclasses import replace

from ir.encoding import Encoding, Int
from ir.errors import OptionError
from ir.sites import Layer, Mark

FLOAT = 16  # bits that stand for "left in floating point"
# Scheme: bits of weights, bits of activations.
SCHEMES = {f"W{w}A{a}": (w, a) for w in (1, 2, 3, 4, 5, 6, 8) for a in (3, 4, 8, FLOAT)}


def bits_of(scheme: str, where: str) -> tuple[int, int]:
    """Bits of weights and of activations.

    Raises:
        OptionError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise OptionError(f"there is no scheme {scheme!r}", where=where, remedy=f"there are {sorted(SCHEMES)}")
    return SCHEMES[scheme]


def with_bits(encoding: Encoding, bits: int) -> Encoding:
    """A weight's encoding with another width; one bit has no zero point."""
    return replace(encoding, format=Int(bits), symmetric=encoding.symmetric or bits == 1)


def change_bits(layer: Layer, scheme: str) -> Mark:
    """The encodings of a linear as it is annotated, but with the bits of a scheme."""
    weights, activations = SCHEMES[scheme]
    given, weight = layer.mark
    if activations == FLOAT:
        return Mark(None, with_bits(weight, weights))
    given = given or Encoding(Int(activations), (1, -1), dynamic=True)
    return Mark(replace(given, format=Int(activations)), with_bits(weight, weights))
