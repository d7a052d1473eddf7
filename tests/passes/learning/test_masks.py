import pytest
import torch

from ir import numerics
from ir.sites import Mark
from passes.learning.masks import MaskGenerator, distance_to, gate, hard, mixed_linear

LOW, HIGH = Mark.parse("i4[1,-1]/i4[1,-1]dynamic"), Mark.parse("i8[1,-1]/i8[1,-1]dynamic")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_generator_has_a_mask_for_every_size_and_starts_open():
    masks = MaskGenerator([5, 9], seeded())()
    assert [len(own) for own in masks] == [5, 9]
    assert all((gate(own, seeded()) > 0.5).float().mean() > 0.8 for own in MaskGenerator([4000], seeded())())


def test_the_same_seed_makes_the_same_generator():
    assert all(torch.equal(a, b) for a, b in zip(MaskGenerator([3], seeded(4))(), MaskGenerator([3], seeded(4))(), strict=True))


def test_hard_gates_pass_the_gradient_of_soft_ones():
    soft = torch.tensor([0.2, 0.7], requires_grad=True)
    values = hard(soft)
    values.sum().backward()
    assert values.tolist() == [0.0, 1.0]
    assert soft.grad.tolist() == [1.0, 1.0]


def test_distance_to_the_budget():
    assert float(distance_to(0.2, torch.tensor(0.2))) == pytest.approx(0)
    assert float(distance_to(0.2, torch.tensor(0.4))) == pytest.approx(float(distance_to(0.2, torch.tensor(0.1))))


@pytest.mark.parametrize("low", [LOW, Mark.parse("i1[1,-1]"), Mark.parse("u2[1,-1]")])
def test_closed_and_open_gates_give_the_split_layer(low):
    x, W, bias = torch.randn(3, 10, generator=seeded()), torch.randn(6, 10, generator=seeded(1)), torch.randn(6, generator=seeded(2))
    gates = torch.zeros(10)
    gates[[1, 4]] = 1.0
    high = HIGH if low.input else Mark(None, HIGH.weight)

    def part(channels, pair):  # the high part's scales are those of all channels
        rows, columns = (x[:, channels], W[:, channels]) if pair is low else (x, W)
        kept = slice(None) if pair is low else channels
        rounded = rows if pair[0] is None else numerics.fake_quantize(rows, pair[0])
        return rounded[:, kept] @ numerics.fake_quantize(columns, pair[1])[:, kept].T

    rest = [i for i in range(10) if i not in (1, 4)]
    exact = part([1, 4], high) + part(rest, low) + bias
    torch.testing.assert_close(mixed_linear(low, high, gates, x, W, bias), exact, rtol=1e-4, atol=1e-4)


def test_gates_of_outliers_get_the_greatest_pull():
    x, W = torch.randn(64, 12, generator=seeded()), torch.randn(8, 12, generator=seeded(1))
    x[:, 7] *= 30
    gates = torch.full((12,), 0.5, requires_grad=True)
    (mixed_linear(LOW, HIGH, gates, x, W) - x @ W.T).square().sum().backward()
    assert gates.grad.argmin() == 7
