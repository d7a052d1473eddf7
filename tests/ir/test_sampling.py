import torch

from ir.sampling import draw, pick


def test_classes_come_as_often_as_their_probabilities_say():
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(20000, 4)
    drawn = draw(logits, torch.Generator().manual_seed(0))
    assert drawn.shape == (20000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.0, 0.25]), rtol=0, atol=0.015)


def test_the_same_seed_draws_the_same():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    one, two = (draw(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)


def test_rows_are_drawn_one_after_the_other_as_all_at_once():
    p = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    generator = torch.Generator().manual_seed(3)
    parts = torch.cat([pick(part, generator) for part in p.split((1, 19, 30))])
    assert torch.equal(parts, pick(p, torch.Generator().manual_seed(3)))
