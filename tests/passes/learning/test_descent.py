import itertools
import math

import pytest
import torch
from torch import nn

from passes.learning.descent import descend, shuffled, split


def test_every_eighth_item_is_held_out():
    assert split(range(17)) == ([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 16], [7, 15])
    assert split([1, 2]) == ([1], [2])


def test_orders_differ_and_repeat_with_the_seed():
    drawn = [[item for item, _ in itertools.islice(shuffled(range(10), seed), 20)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0][:10]) == sorted(drawn[0][10:]) == list(range(10))


def test_descent_finds_the_least_squares():
    x = nn.Parameter(torch.zeros(3))
    found = descend(
        [x],
        lambda item: (x - item).square().sum(),
        iter(itertools.repeat(torch.ones(3))),
        [torch.ones(3)],
        rate=0.1,
        steps=lambda state: range(200),
        count=200,
    )
    assert found < 1e-3
    assert torch.allclose(x, torch.ones(3), atol=0.05)


@pytest.mark.parametrize("worse", [math.nan, 1.0])
def test_what_is_worse_than_the_start_is_not_kept(worse):
    x = nn.Parameter(torch.zeros(1))

    def loss(item):
        return (x - item).square().sum() if item else x.sum() ** 2 * (1 if worse == 1.0 else worse)

    descend([x], loss, iter(itertools.repeat(1.0)), [0.0], rate=0.1, steps=lambda state: range(8), count=8)
    assert float(x.detach()) == 0


def test_nothing_to_learn_only_looks():
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    assert descend([frozen], lambda item: frozen.sum() * item, iter([]), [2.0], rate=0.1, steps=lambda state: range(0), count=1) == 2
