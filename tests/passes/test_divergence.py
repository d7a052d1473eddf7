import torch

from passes.divergence import corrected

LOGITS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0, 1, 2, 3], [4, 0, 1, 2]])


def test_the_next_token_takes_over_its_share():
    p, q = LOGITS.softmax(-1), corrected(LOGITS, IDS, None, 0.25).exp()
    expected = 0.75 * p[:, :-1] + 0.25 * torch.nn.functional.one_hot(IDS[:, 1:], 5)
    torch.testing.assert_close(q[:, :-1], expected)
    torch.testing.assert_close(q[:, -1], p[:, -1])


def test_masked_tokens_say_nothing():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]])  # two tokens of a past, then those of `IDS`
    p, q = LOGITS.softmax(-1), corrected(LOGITS, IDS, mask, 0.25).exp()
    torch.testing.assert_close(q[1, :2], p[1, :2])
    assert not torch.allclose(q[1, 2], p[1, 2])
    assert not torch.allclose(q[0, 0], p[0, 0])
