import torch
from torch import nn
from torch.utils import _pytree as pytree

from ir.flatten import flatten, input_names, output_names
from ir.verify import verify


class Appends(nn.Module):
    """Starts from an empty tensor that it makes itself, as a model does that makes its own cache."""

    def forward(self, x):
        return {"logits": torch.cat([torch.tensor([], dtype=x.dtype), x.flatten()])}


def test_guards_and_empty_beginnings_are_gone():
    x = torch.ones(2, 3)
    module = torch.export.export(Appends(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    gm = flatten(module, ["x"], ["logits"], [x])
    verify(gm, stage="capture")
    assert [port.shape for port in gm.meta["signature"].inputs] == [(None, 3)]
    assert torch.equal(gm(torch.ones(4, 3))[0], torch.ones(12))


def test_names_of_inputs_and_outputs_are_dotted_paths():
    x = torch.ones(1)
    assert input_names({"input_ids": x, "past_key_values": [x, x, x, x]})[2:4] == ["past_key_values.0.value", "past_key_values.1.key"]
    spelled = {"logits": x, "past_key_values.layers.0.keys": x, "past_key_values.layers.0.values": x, "states": [x, x]}
    expected = ("dict", ["logits", "present.0.key", "present.0.value", "states.0", "states.1"])
    assert output_names(pytree.tree_structure(spelled)) == expected
