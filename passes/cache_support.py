"""Which widths of a cache the backend keeps: asked for the keys and values of a layer together, since some keep both alike or neither."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from ir.cache import CacheSite
from ir.encoding import Encoding
from ir.schemes import FLOAT
from passes.backend import Backend

EncodingOf = Callable[[str, int], Encoding]  # of keys or values, with so many bits


def refusals(site: CacheSite, widths: Mapping[str, Sequence[int]], encoding: EncodingOf, backend: Backend) -> dict[int, str | None]:
    """For every width that a site may get, why no width of the other part goes with it; None if one does.

    Args:
        site: keys or values of a layer.
        widths: what keys, and values, may get; 16 stays in floating point.
        encoding: by part and bits.
        backend: which is asked.
    """
    others = next((given for part, given in widths.items() if part != site.part), (FLOAT,))
    other = next((part for part in widths if part != site.part), "")
    found: dict[int, str | None] = {}
    for bits in widths[site.part]:
        reasons = [_ask({site.part: bits, other: beside}, site, encoding, backend) for beside in others]
        found[bits] = None if None in reasons else reasons[0]
    return found


def clash(sites: Mapping[CacheSite, Sequence[int]], encoding: EncodingOf, backend: Backend) -> str | None:
    """Why widths that keys and values of a layer may get do not go together, whichever are chosen; None if all do."""
    layers: dict[str, list[CacheSite]] = {}
    for site in sites:
        layers.setdefault(site.name.partition(".")[0], []).append(site)
    for members in layers.values():
        for chosen in product(*(sites[site] for site in members)):
            bits = {site.part: width for site, width in zip(members, chosen, strict=True)}
            if reason := _ask(bits, members[0], encoding, backend):
                return reason
    return None


def _ask(bits: Mapping[str, int], site: CacheSite, encoding: EncodingOf, backend: Backend) -> str | None:
    encodings = {part: encoding(part, width) for part, width in bits.items() if width != FLOAT}
    return backend.supports("Cache", encodings, (site.heads, site.width)) if encodings else None
