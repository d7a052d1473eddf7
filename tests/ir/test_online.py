import pytest

from ir.channels import Map, channel_groups
from ir.online import online_inputs
from tests.families import load
from tests.passes.maps import OPENED
from tests.passes.samples import run


@pytest.mark.parametrize(
    ("family", "ends"), [("llama", "down_proj"), ("gpt2", "mlp.c_proj"), ("gemma2", "down_proj"), ("opt", "fc2"), ("phi3", "down_proj")]
)
def test_what_a_nonlinearity_makes_is_rotated_online(family, ends):
    gm = load(family).graph()
    run(gm, OPENED)
    found = online_inputs(gm, channel_groups(gm, Map.ROTATE))
    assert [layer.path.endswith(ends) for layers in found.values() for layer in layers] == [True, True]


def test_where_layers_are_annotated_only_these_count():
    gm = load("llama").graph()
    run(gm, f"{OPENED}, annotate(ignore=['re:.*layers.1.*'])")
    (layers,) = online_inputs(gm, channel_groups(gm, Map.ROTATE)).values()
    assert [layer.path for layer in layers] == ["model.layers.0.mlp.down_proj"]
