"""Round linears on several processes: whole ones, or ranges of rows where a method rounds these apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.encoding import Encoding
from ir.numerics import QParams
from ir.rounding import Evidence, Rounding
from ir.sites import Layer
from passes.ranks import Ranks

ROWS = 64  # ranges of rows are multiples: matrix products round a row of these as they round it among all others
Known = tuple[Layer, Evidence, Tensor]  # a linear, what is known about it, and the weight to round
Coded = tuple[Tensor, QParams]


@dataclass(frozen=True)
class Piece:
    """Rows of a linear, by its place among those that are rounded together, and the process that rounds them."""

    place: int
    rows: slice
    owner: int


def codes_of(ranks: Ranks, rounding: Rounding, known: Sequence[Known]) -> list[Coded]:
    """The codes of linears, in order, on all processes; each rounds a share of the weights."""
    cut = pieces(ranks.world, [(tuple(W.shape), _apart(rounding, layer.mark.weight, W)) for layer, _, W in known])
    mine = [piece for piece in cut if piece.owner == ranks.rank]
    found = ranks.collect([piece.owner for piece in cut], (tensors(_rounded(rounding, known[piece.place], piece.rows)) for piece in mine))
    return [_joined([part for piece, part in zip(cut, found, strict=True) if piece.place == place]) for place in range(len(known))]


def pieces(world: int, weights: Sequence[tuple[tuple[int, ...], bool]]) -> list[Piece]:
    """Who rounds what, so that all have about as much to do.

    Args:
        world: processes.
        weights: the shape of each weight `[N, K]`, and whether its rows may go to several.
    """
    load, total = [0.0] * world, sum(N * K for (N, K), _ in weights)
    cut: list[Piece] = []
    for place, ((N, K), apart) in sorted(enumerate(weights), key=lambda item: (item[1][1], -item[1][0][0] * item[1][0][1])):
        start = 0
        while start < N:  # whole ones go first, the greatest before the rest; then ranges of rows fill up
            owner = min(range(world), key=lambda rank: load[rank])
            room = round((total / world - load[owner]) / K / ROWS) * ROWS
            stop = min(N, start + max(room, ROWS)) if apart and world > 1 else N
            stop = N if N - stop < ROWS else stop
            cut.append(Piece(place, slice(start, stop), owner))
            load[owner] += (stop - start) * K
            start = stop
    return sorted(cut, key=lambda piece: (piece.place, piece.rows.start))


def _apart(rounding: Rounding, encoding: Encoding, W: Tensor) -> bool:
    """Whether rows of a weight can be rounded by several processes."""
    return rounding.by_rows and encoding.block_shape(tuple(W.shape))[0] == 1


def _rounded(rounding: Rounding, known: Known, rows: slice) -> Coded:
    layer, evidence, W = known
    return rounding.round_weight(W[rows], layer.mark.weight, evidence)


def tensors(made: Coded) -> dict[str, Tensor]:
    """Codes and their parameters, by name."""
    codes, qparams = made
    found = {"codes": codes, "scale": qparams.scale}
    return found if qparams.zero_point is None else found | {"zero_point": qparams.zero_point}


def coded(parts: Mapping[str, Tensor]) -> Coded:
    """The inverse of `tensors`."""
    return parts["codes"], QParams(parts["scale"], parts.get("zero_point"))


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> Coded:
    """Ranges of rows, in order, as one."""
    return coded(parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
