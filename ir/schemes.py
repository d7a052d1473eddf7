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


def change_bits(layer: Layer, scheme: str) -> tuple[Encoding | None, Encoding]:
    """The encodings of a layer's input and weight as they are annotated, but with the bits of a scheme."""
    weights, activations = SCHEMES[scheme]
    weight, given = layer.site("weight").encoding, layer.site("input").encoding
    assert weight is not None
    weight = replace(weight, format=Int(weights), symmetric=weight.symmetric or weights == 1)
    if activations == FLOAT:
        return None, weight
    given = given or Encoding(Int(activations), (1, -1), dynamic=True)
    return replace(given, format=Int(activations)), weight
