import pytest
import torch

from passes.learning import divergence as module
from passes.learning.divergence import corrected, divergence

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


@pytest.mark.parametrize("together", [1, 12, 1 << 20])
def test_the_divergence_and_its_gradient_are_those_of_all_rows_at_once(monkeypatch, together):
    monkeypatch.setattr(module, "TOGETHER", together)
    found, again = (torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    exact = (LOGITS.softmax(-1) * (LOGITS.log_softmax(-1) - again.log_softmax(-1))).sum(-1).mean()
    (3 * exact).backward()
    (3 * divergence(found, LOGITS)).backward()
    torch.testing.assert_close(divergence(found, LOGITS), exact)
    torch.testing.assert_close(found.grad, again.grad)
    with torch.no_grad():
        assert not divergence(found, LOGITS).requires_grad
