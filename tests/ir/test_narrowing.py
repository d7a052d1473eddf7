import pytest
import torch

from ir import edit
from ir.match import operand
from ir.narrowing import read_some, write_some
from ir.residual import branches
from ir.verify import verify
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import run


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # bare, with biases
def test_what_is_left_equals_its_masked_twin(name):
    gm, twin = (load(name).graph() for _ in range(2))
    run(gm, "canonicalize")
    run(twin, "canonicalize")
    generator = torch.Generator().manual_seed(0)
    for mine, other in zip(branches(gm), branches(twin), strict=True):
        reads, writes = (torch.rand(64, generator=generator) < 0.6 for _ in range(2))
        read_some(gm, mine.first, reads)
        for layer in other.first:
            edit.set_attribute(twin, layer.weight, edit.attribute(twin, layer.weight).detach() * reads)
        (last,), (end,) = mine.last, other.last
        write_some(gm, last.node, writes)
        for node in (end.weight, operand(end.node, "bias")):
            if node is not None:
                stored = edit.attribute(twin, node).detach()
                edit.set_attribute(twin, node, stored * writes.view(-1, *[1] * (stored.ndim - 1)))
    edit.clean(gm)
    verify(gm)
    after, expected = (load(name).steps(each, lengths=(7, 1, 1)) for each in (gm, twin))
    assert max(relative_error((a,), (b,)) for a, b in zip(after, expected, strict=True)) < 1e-5
    assert all(edit.value(layer.weight).shape[1] < 64 for branch in branches(gm) for layer in branch.first)
