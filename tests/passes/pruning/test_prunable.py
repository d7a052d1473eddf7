import pytest

from passes.pruning.kinds import HEADS, KINDS, MLP, QUERY_HEADS
from passes.pruning.prunable import found_units
from tests.families import FAMILIES, LAYERS, load
from tests.passes.samples import run


def prepared(name, pipeline="canonicalize"):
    gm = load(name).graph()
    run(gm, pipeline)
    return gm


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_channels_and_heads_or_says_why_not(name):
    units, left = found_units(prepared(name), KINDS, ())
    assert [own.what for own in units if own.what == MLP] == [MLP] * LAYERS
    if name == "olmo2":
        assert all("norm runs over all its channels" in reason or "compares" in reason for reason in left), left
        assert sum(map(len, left.values())) == 4 * LAYERS
        return
    assert [own.what for own in units] == [HEADS, MLP] * LAYERS
    assert {layer.path for found in left.values() for layer in found} <= {"cls.predictions.transform.dense"}


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("phi3", 2), ("gpt2", 4), ("bert", 4)])
def test_a_unit_counts_all_its_weights(name, heads):
    units, _ = found_units(prepared(name), KINDS, ())
    first, second = units[:2]
    biased = name in {"gpt2", "bert"}
    grouped = heads == 2
    assert (first.size, first.weights) == (heads, 64 * 16 * (6 if grouped else 4) + 48 * biased)
    assert second.weights == (2 * 64 + 1 if biased else 3 * 64)


def test_kinds_and_layers_can_be_left_out():
    gm = prepared("llama")
    units, left = found_units(gm, [MLP], ["re:.*layers.0.*"])
    assert [own.path for own in units] == ["model.layers.1.mlp.down_proj"]
    assert left.keys() == {"they are ignored", "they are not asked for"}
    assert [layer.path for layer in left["they are ignored"]] == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_a_head_of_queries_for_each_of_keys_is_no_unit():
    units, left = found_units(prepared("gpt2"), [MLP, QUERY_HEADS], ())
    assert {own.what for own in units} == {MLP}
    assert "each head of keys has one of queries" in left
