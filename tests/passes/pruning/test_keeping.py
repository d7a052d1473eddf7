import itertools

import pytest
import torch

from ir.channels import ChannelGroup, Map
from passes.pruning.keeping import dropped_share, free, greatest, most, uniform, whole
from passes.pruning.kinds import BLOCKS, HEADS, MLP, Units


def units(size, what=MLP, weights=10):
    return Units(ChannelGroup(Map.SELECT, size, 1, ()), what, (), weights)


def drawn(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator) for size in sizes]


@pytest.mark.parametrize(("share", "kept"), [(0.0, [96, 96]), (0.2, [80, 80]), (0.25, [72, 72]), (0.95, [8, 8])])
def test_uniform_keeps_multiples(share, kept):
    assert uniform([units(96), units(96)], share, 8) == kept


def test_channels_make_up_for_heads_that_come_as_wholes():
    both = [units(4, HEADS, 100), units(100, MLP, 10)]
    assert uniform(both, 0.2, 1) == [3, 82]  # 280 of 1400: one head and 18 channels
    assert dropped_share(both, [3, 82]) == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_free_finds_the_least_loss(share):
    sizes = [3, 4, 3]
    groups = [units(size, weights=weights) for size, weights in zip(sizes, (5, 10, 10), strict=True)]
    scores = drawn(sizes)
    kept = free(groups, scores, share, 1)

    def lost(counts):
        return sum(float(score.sort().values[: len(score) - count].sum()) for score, count in zip(scores, counts, strict=True))

    budget = (1 - share) * 85 + 2.5
    fitting = [
        c
        for c in itertools.product(*(range(1, size + 1) for size in sizes))
        if sum(n * g.weights for n, g in zip(c, groups, strict=True)) <= budget
    ]
    assert lost(kept) == pytest.approx(min(map(lost, fitting)))


def test_free_keeps_multiples_of_channels_and_whole_heads():
    groups = [units(4, HEADS, 40), units(96), units(96)]
    heads, *channels = free(groups, drawn([4, 96, 96]), 0.3, 8)
    assert 1 <= heads <= 4
    assert all(count % 8 == 0 for count in channels)


def test_what_cannot_go_stays():
    groups = [units(4, HEADS, 40), units(16)]
    assert free(groups, drawn([4, 16]), 0.99, 8) == uniform(groups, 0.99, 8) == [1, 8]
    assert most(groups, 8) == dropped_share(groups, [1, 8]) == pytest.approx(200 / 320)


def test_whole_units_meet_the_share_first_and_lose_least_then():
    groups = [units(1, BLOCKS, weights) for weights in (10, 15, 10, 15)]
    scores = [torch.tensor([score]) for score in (4.0, 1.0, 3.0, 2.0)]
    assert whole(groups, scores, 0.5, 0.01) == [1, 0, 0, 1]
    assert whole(groups, scores, 0.22, 0.01) == [1, 1, 0, 1]
    assert whole(groups, scores, 0.28, 0.01) == [1, 0, 1, 1]
    assert whole(groups, scores, 0.0, 0.01) == [1, 1, 1, 1]


def test_of_equal_units_the_first_stay():
    assert greatest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]
