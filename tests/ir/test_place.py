import torch
from torch import Tensor, nn

from ir import edit
from ir.capture import capture
from ir.place import device_of, place


class Counted(nn.Module):
    """Adds positions that it makes, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1], device=x.device)[:, None] + self.table


def test_tensors_and_what_operators_make_follow() -> None:
    gm = capture(Counted(), args=(torch.zeros(2, 3, 4),))
    x = torch.zeros(3, 5, 4)
    (before,) = gm(x)
    assert device_of(gm) == torch.device("cpu")
    shared = edit.copied(gm)
    place(gm, torch.device("meta"))
    assert device_of(shared) == torch.device("cpu") and torch.equal(shared(x)[0], before)
    assert device_of(gm) == torch.device("meta") and gm(x.to("meta"))[0].device.type == "meta"
    assert before.shape == gm(x.to("meta"))[0].shape
    assert device_of(torch.fx.symbolic_trace(nn.Identity())) == torch.device("cpu")
