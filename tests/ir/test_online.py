import pytest
import torch

from ir.channels import Map, channel_groups
from ir.online import online_inputs
from tests.families import load
from tests.passes.maps import OPENED
from tests.passes.samples import run


def found_in(gm):
    return online_inputs(gm, channel_groups(gm, Map.ROTATE))


@pytest.mark.parametrize(
    ("family", "ends"), [("llama", "down_proj"), ("gpt2", "mlp.c_proj"), ("gemma2", "down_proj"), ("opt", "fc2"), ("phi3", "down_proj")]
)
def test_what_a_nonlinearity_makes_is_rotated_online(family, ends):
    gm = load(family).graph()
    run(gm, OPENED)
    found, left = found_in(gm)
    assert [layer.path.endswith(ends) for layers in found.values() for layer in layers] == [True, True]
    assert not left


def test_where_layers_are_annotated_only_these_count():
    gm = load("llama").graph()
    run(gm, f"{OPENED}, annotate(ignore=['re:.*layers.1.*'])")
    (layers,) = found_in(gm)[0].values()
    assert [layer.path for layer in layers] == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_writes_is_never_rotated_online(dtype):
    gm = load("llama", dtype).graph()
    run(gm, "canonicalize")  # gains and tied weights freeze the residual stream
    found, _ = found_in(gm)
    assert {layer.path.rpartition(".")[2] for layers in found.values() for layer in layers} == {"down_proj"}


def test_a_shared_weight_is_left_with_a_reason():
    gm = load("llama").graph()
    run(gm, OPENED)
    first, second = [layer for layers in found_in(gm)[0].values() for layer in layers]
    second.node.replace_input_with(second.weight, first.weight)
    found, left = found_in(gm)
    assert not found
    assert set(left) == {first.path, second.path}
    assert all("untie" in reason for reason in left.values())
