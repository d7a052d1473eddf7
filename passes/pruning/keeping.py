"""Which units to keep: the same share in every layer, or what costs least over all."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from ir import knapsack
from passes.pruning.kinds import CHANNELS, Units

Kept = list[int]  # how many units of each group


def uniform(units: Sequence[Units], share: float, multiple: int) -> Kept:
    """The same share of every group: heads to the nearest whole one, and channels, in multiples, to meet the share of weights."""
    total = sum(own.size * own.weights for own in units)
    kept = {index: _nearest(own.size, share, 1) for index, own in enumerate(units) if own.what not in CHANNELS}
    dropped = sum((units[index].size - count) * units[index].weights for index, count in kept.items())
    room = sum(own.size * own.weights for own in units if own.what in CHANNELS)
    rest = min(max((share * total - dropped) / max(room, 1), 0.0), 1.0)
    return [kept[index] if index in kept else _nearest(own.size, rest, multiple) for index, own in enumerate(units)]


def at_shares(own: Units, shares: Sequence[float], multiple: int) -> list[int]:
    """How many of a group stay at each of some shares, to the nearest count allowed; each once, in falling order."""
    return sorted({_nearest(own.size, 1 - share, step(own, multiple)) for share in shares}, reverse=True)


def _nearest(size: int, share: float, multiple: int) -> int:
    """How many of `size` stay when about a share goes: of the counts allowed the nearest, of two the greater."""
    return min(reversed(_counts(size, multiple)), key=lambda count: abs(count - (1 - share) * size))


def _counts(size: int, multiple: int) -> list[int]:
    """How many may be kept: multiples, and all; a unit by itself stays or goes."""
    return [0, 1] if size == 1 else [*range(multiple, size, multiple), size]


def step(own: Units, multiple: int) -> int:
    """What counts of a group are multiples of: heads go one by one."""
    return multiple if own.what in CHANNELS else 1


def free(units: Sequence[Units], scores: Sequence[Tensor], share: float, multiple: int) -> Kept:
    """Least total score of what is dropped, for at most so many weights that stay, up to half a unit: an exact knapsack."""
    total = sum(own.size * own.weights for own in units)
    steps = [own.weights * step(own, multiple) for own in units]
    sites = []
    choices = [_counts(own.size, step(own, multiple)) for own in units]
    for own, score, counts in zip(units, scores, choices, strict=True):
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), score.double().sort().values.cumsum(0)])
        sites.append([knapsack.Option(float(lost[own.size - count]), count * own.weights) for count in counts])
    least = sum(own.weights * counts[0] for own, counts in zip(units, choices, strict=True))
    picks = knapsack.solve(sites, max(int((1 - share) * total + min(steps, default=0) / 2), least)).picks
    return [counts[pick] for counts, pick in zip(choices, picks, strict=True)]


def whole(units: Sequence[Units], scores: Sequence[Tensor], share: float, close: float) -> Kept:
    """Least total score of units by themselves that go, for a share of the weights within `close`, or else as near to it as can be.

    Of units with as many weights those with the least scores go, so that counts of each size are all there is to choose.
    """
    total = sum(own.weights for own in units)
    alike: dict[int, list[int]] = {}
    for index in sorted(range(len(units)), key=lambda index: float(scores[index])):
        alike.setdefault(units[index].weights, []).append(index)
    best: tuple[float, float, list[int]] = (1.0, 0.0, [])
    for counts in product(*(range(len(found) + 1) for found in alike.values())):
        gone = [index for count, found in zip(counts, alike.values(), strict=True) for index in found[:count]]
        off = abs(sum(units[index].weights for index in gone) / max(total, 1) - share)
        best = min(best, (round(max(off - close, 0.0), 9), sum(float(scores[index]) for index in gone), gone))
    return [int(index not in best[2]) for index in range(len(units))]


def most(units: Sequence[Units], multiple: int) -> float:
    """The greatest share of weights that can go."""
    return dropped_share(units, [_counts(own.size, step(own, multiple))[0] for own in units])


def greatest(score: Tensor, count: int) -> Tensor:
    """The units with the greatest scores, in rising order; of equal ones the first."""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def dropped_share(units: Sequence[Units], kept: Kept) -> float:
    """The share of the units' weights that goes."""
    total = sum(own.size * own.weights for own in units)
    return sum((own.size - count) * own.weights for own, count in zip(units, kept, strict=True)) / max(total, 1)
