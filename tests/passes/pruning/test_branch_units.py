import torch

from passes.pruning.branch_units import branch_units
from passes.pruning.kinds import ALL, BLOCKS, INPUTS, LAYERS, OUTPUTS
from tests.families import load
from tests.passes.samples import run


def test_dims_branches_and_layers_of_a_model():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    found = {kind: [own for own in branch_units(gm, ALL) if own.what == kind] for kind in (INPUTS, OUTPUTS, BLOCKS, LAYERS)}
    attention, mlp = 64 * (64 + 2 * 32 + 64), 3 * 64 * 96
    paths = {kind: [own.path.removeprefix("model.layers.") for own in units][:2] for kind, units in found.items()}
    assert paths == {
        INPUTS: ["0.self_attn.q_proj", "0.mlp.gate_proj"],
        OUTPUTS: ["0.self_attn.o_proj", "0.mlp.down_proj"],
        BLOCKS: ["0.self_attn", "0.mlp"],
        LAYERS: ["0", "1"],
    }
    assert [(own.size, own.weights) for own in found[INPUTS][:2]] == [(64, 128), (64, 192)]
    assert [(own.size, own.weights) for own in found[OUTPUTS][:2]] == [(64, 64), (64, 96)]
    assert [(own.size, own.weights) for own in found[BLOCKS][:2]] == [(1, attention), (1, mlp)]
    assert [(own.size, own.weights) for own in found[LAYERS]] == [(1, attention + mlp)] * 2
    ((value, channels),) = found[BLOCKS][0].writes
    assert torch.equal(channels, torch.zeros(64, dtype=torch.int64))
    assert found[BLOCKS][0].felt == {value: channels}
