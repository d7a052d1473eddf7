import torch

from ir.smoothing import layer_error
from tools.smoothrot_families import balanced


def test_closed_form_scales_give_both_sides_of_a_channel_the_same_norm():
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(rows, 24, generator=generator) for rows in (200, 16))
    X *= torch.randn(24, generator=generator).exp()
    X[:, 4] = 0
    s = balanced(X, W)
    ratio = (X / s).norm(dim=0) / (W * s).norm(dim=0)
    live = torch.arange(24) != 4
    torch.testing.assert_close(ratio[live], ratio[0].expand(23))
    assert layer_error(X, W, s)[0] < layer_error(X, W)[0]
