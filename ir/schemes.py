"""Schemes: the field's names for the bits of weights and of activations, `W4A8`."""

from dataclasses import replace

from ir.encoding import Encoding, Int
from ir.errors import OptionError
from ir.sites import Layer

FLOAT = 16  # bits that stand for "left in floating point"
# Scheme: bits of weights, bits of activations.
SCHEMES = {
    f"W{w}A{a}": (w, a)
    for w, a in (
        (8, 8),
        (8, 16),
        (6, 16),
        (5, 16),
        (4, 16),
        (3, 16),
        (2, 16),
        (1, 16),
        (4, 8),
        (4, 4),
        (3, 3),
        (2, 4),
        (3, 4),
        (3, 8),
        (2, 8),
    )
}


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


def change_bits(layer: Layer, scheme: str) -> tuple[Encoding | None, Encoding]:
    """The encodings of a layer's input and weight as they are annotated, but with the bits of a scheme."""
    weights, activations = SCHEMES[scheme]
    weight, given = layer.site("weight").encoding, layer.site("input").encoding
    assert weight is not None
    weight = with_bits(weight, weights)
    if activations == FLOAT:
        return None, weight
    given = given or Encoding(Int(activations), (1, -1), dynamic=True)
    return replace(given, format=Int(activations)), weight
