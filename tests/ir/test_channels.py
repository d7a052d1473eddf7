"""The law of channel groups on whole models: random maps of all free groups, over prefill and two steps with the cache."""

from functools import cache

import pytest

from ir import edit
from ir.channels import Map, channel_groups
from ir.verify import verify
from passes.probe import relative_error
from tests.families import FAMILIES, load
from tests.ir.channels.samples import group_of
from tests.mapping import map_all
from tests.passes.samples import run
from tests.wide import in_float64

LENGTHS = (7, 1, 1)


@cache
def _prepared(name, pipeline):
    gm = load(name).graph()
    run(gm, pipeline)
    return gm


def prepared(name, pipeline="canonicalize, untie, fold_norm, center_norm"):
    return edit.copied(_prepared(name, pipeline))


@pytest.mark.parametrize("name", FAMILIES)
def test_random_maps_keep_the_function_of_every_family(name):
    gm = in_float64(prepared(name))
    before = load(name).steps(gm, lengths=LENGTHS)
    for kind in (Map.ROTATE, Map.PERMUTE, Map.LINEAR, Map.SCALE):  # scales last: they put gains back into the norms
        groups = map_all(gm, kind)
        assert any(not group.reason for group in groups)
        after = load(name).steps(gm, lengths=LENGTHS)
        assert max(relative_error((a,), (b,)) for a, b in zip(after, before, strict=True)) < 1e-9, kind
    verify(gm)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "opt", "gpt_neox"])
def test_the_residual_stream_turns_as_one(name):
    streams = [group for group in channel_groups(prepared(name), Map.ROTATE) if not group.reason and (group.blocks, group.block) == (1, 64)]
    assert len(streams) == 1
    assert len(streams[0].writers) >= 5  # the embedding and two layers of two


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [
        ("llama", "model.layers.0.self_attn.v_proj.weight", (2, 16)),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (2, 16)),
        ("gpt2", "transformer.h.0.attn.c_attn.weight_transposed", (4, 16)),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", (4, 16)),
    ],
)
def test_values_turn_by_head(name, path, shape):
    gm = prepared(name)
    rows = next(edit.value(node).shape[0] for node in gm.graph.find_nodes(op="get_attr") if node.target == path)
    group = group_of(gm, Map.ROTATE, path, at=rows - 1)  # values are last in fused projections, by head in GPT-NeoX
    assert (group.reason, group.blocks, group.block) == ("", *shape)


def test_a_tied_head_scales_only_after_untie():
    tied, apart = (prepared("llama_tied", pipeline) for pipeline in ("canonicalize", "canonicalize, untie"))
    assert not group_of(apart, Map.SCALE, "lm_head.weight", axis=1).reason
    assert group_of(tied, Map.SCALE, "model.embed_tokens.weight", axis=1).reason
    assert "model.norm.weight" in {member.path for member in group_of(apart, Map.SCALE, "lm_head.weight", axis=1).members}


def test_norms_behind_branches_freeze_the_stream_and_say_so():
    (reason,) = {
        group.reason
        for group in channel_groups(prepared("gemma2"), Map.ROTATE)
        if group.block == 64 and len(group.writers) == 1 and "embed" in str(group)
    }
    assert "has a gain or bias that is not folded" in reason


def test_quantized_weights_freeze_what_they_read():
    gm = load("llama").graph()
    run(gm, "canonicalize, untie, annotate(scheme='W8A16', group=16), round_weights(method='nearest')")
    free = [group for group in channel_groups(gm, Map.SCALE) if not group.reason]
    assert all(not any("proj" in member.path for member in group.members) for group in free)


def test_logits_are_the_callers():
    group = group_of(prepared("llama"), Map.PERMUTE, "lm_head.weight")
    assert group.reason == "it is an output of the model"
