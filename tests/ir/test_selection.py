"""Dropping channels: what is left equals its twin, the graph as it was with the dropped channels made zero where they are read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F  # noqa: N812 (everyone's name for it)

from ir import edit, evaluate
from ir.capture import capture
from ir.channels import ChannelGroup, Map, channel_groups
from ir.errors import PassError
from ir.selection import select, stays
from ir.text import graph_text
from ir.verify import verify
from passes.probe import relative_error
from tests.families import distinct_first, load
from tests.ir.channels.samples import SAMPLES, graph, heads, joined, sample, softmax_attention
from tests.ir.inference import check_shapes
from tests.passes.samples import run, weights

LENGTHS = (7, 1, 1)
Pick = Callable[[ChannelGroup], Tensor]


def prepared(name: str) -> GraphModule:
    gm = load(name).graph()
    run(gm, "canonicalize")
    return gm


def free(gm: GraphModule, copies: bool = False) -> list[ChannelGroup]:
    return [group for group in channel_groups(gm, Map.SELECT, copies=copies) if not group.reason and group.readers]


def masked(gm: GraphModule, group: ChannelGroup, channels: Tensor) -> None:
    """Make columns zero that read dropped channels."""
    for member in group.readers:
        weight = edit.attribute(gm, member.node).detach().clone()
        weight.movedim(member.axis, 0)[~stays(group, channels, member.channels)] = 0
        edit.set_attribute(gm, member.node, weight)


def some(group: ChannelGroup, seed: int) -> Tensor:
    """About two thirds of the channels, drawn."""
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(0.67 * group.size) - 1)].sort().values


@pytest.mark.parametrize("name", distinct_first())
def test_what_is_left_equals_its_masked_twin(name):
    gm, twin = prepared(name), prepared(name)
    picked = [(group, some(group, index)) for index, group in enumerate(free(gm))]
    for (_, channels), group in zip(picked, free(twin), strict=True):
        masked(twin, group, channels)
    before = sum(edit.attribute(gm, node).numel() for node in gm.graph.find_nodes(op="get_attr"))
    select(gm, picked)
    edit.clean(gm)
    verify(gm)
    check_shapes(gm)
    after, expected = (load(name).steps(each, lengths=LENGTHS) for each in (gm, twin))
    assert max(relative_error((a,), (b,)) for a, b in zip(after, expected, strict=True)) < 1e-5
    assert sum(edit.attribute(gm, node).numel() for node in gm.graph.find_nodes(op="get_attr")) < 0.9 * before
    evaluate.run(gm, gm.meta["example"])  # the example follows


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_one_query_of_every_head_of_keys_can_go(name):
    gm, twin = prepared(name), prepared(name)
    keep = torch.tensor([1])
    groups, twins = ([group for group in free(each, copies=True) if group.size == 2] for each in (gm, twin))
    assert len(groups) == 2
    for group in twins:
        masked(twin, group, keep)
    select(gm, [(group, keep) for group in groups])
    edit.clean(gm)
    verify(gm)
    check_shapes(gm)
    after, expected = (load(name).steps(each, lengths=LENGTHS) for each in (gm, twin))
    assert max(relative_error((a,), (b,)) for a, b in zip(after, expected, strict=True)) < 1e-5
    shapes = {port.name: port.shape for port in gm.meta["signature"].inputs}
    assert shapes["past_key_values.0.key"][1] == 2  # keys stay


@pytest.mark.parametrize(
    "repeat",
    [lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2), lambda x: x.repeat_interleave(2, 1), None],
    ids=["expand", "interleave", "as one"],
)
def test_copies_go_however_keys_are_repeated(repeat):
    def attention(x, q, k, v, o):
        q, k, v = (heads(F.linear(x, w), count) for w, count in ((q, 4), (k, 2), (v, 2)))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True) if repeat is None else softmax_attention(q, repeat(k), repeat(v))
        return F.linear(joined(mixed), o)

    shapes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    gm, twin = (graph(attention, **shapes) for _ in range(2))
    (group,), (other,) = (free(each, copies=True) for each in (gm, twin))
    masked(twin, other, torch.tensor([0]))
    select(gm, [(group, torch.tensor([0]))])
    edit.clean(gm)
    verify(gm)
    check_shapes(gm)
    x = torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative_error(evaluate.run(gm, [x]), evaluate.run(twin, [x])) < 1e-12
    assert {name: tuple(tensor.shape) for name, tensor in weights(gm).items()} == shapes | {"q": (8, 16), "o": (16, 8)}


@pytest.mark.parametrize("name", SAMPLES)
def test_small_graphs_equal_their_masked_twins(name):
    gm, twin = capture(sample(name)), capture(sample(name))
    picked = [(group, some(group, index)) for index, group in enumerate(free(gm))]
    for (_, channels), group in zip(picked, free(twin), strict=True):
        masked(twin, group, channels)
    select(gm, picked)
    edit.clean(gm)
    verify(gm)
    check_shapes(gm)
    x = torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    after, expected = (evaluate.run(each, [x]) for each in (gm, twin))
    assert relative_error(after, expected) < 1e-12


def test_all_channels_are_the_graph_as_it_was():
    gm = prepared("phi3")
    text, kept = graph_text(gm), weights(gm)
    select(gm, [(group, torch.arange(group.size)) for group in free(gm)])
    assert graph_text(gm) == text
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(gm).items())


def test_the_cache_shrinks_with_its_heads_and_inputs_follow():
    gm = prepared("llama")
    group = next(group for group in free(gm) if group.size == 2)
    example = gm.meta["example"]
    convert = select(gm, [(group, torch.tensor([1]))])
    signature = gm.meta["signature"]
    shapes = {port.name: port.shape for port in (*signature.inputs, *signature.outputs)}
    assert shapes["past_key_values.0.key"][1] == shapes["present.0.value"][1] == 1
    assert shapes["past_key_values.1.key"][1] == 2
    converted = dict(zip((port.name for port in signature.inputs), convert(example), strict=True))
    before = dict(zip((port.name for port in signature.inputs), example, strict=True))
    assert torch.equal(converted["past_key_values.0.key"], before["past_key_values.0.key"][:, 1:])
    assert converted["past_key_values.1.key"] is before["past_key_values.1.key"]


def test_the_callers_tensors_are_left_alone():
    gm = prepared("llama")
    before = {name: tensor.clone() for name, tensor in weights(load("llama").captured).items()}
    select(gm, [(group, torch.tensor([0])) for group in free(gm)])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(load("llama").captured).items())


@pytest.mark.parametrize("channels", [[], [1, 0], [0, 0], [-1], [16]])
def test_what_is_no_selection_is_refused(channels):
    gm = capture(sample("relu"))
    with pytest.raises(PassError, match="at least one channel"):
        select(gm, [(free(gm)[0], torch.tensor(channels, dtype=torch.int64))])


def test_frozen_groups_and_other_maps_are_refused():
    gm = capture(sample("softmax"))
    frozen = next(group for group in channel_groups(gm, Map.SELECT) if group.reason)
    with pytest.raises(PassError, match="no channel can be dropped"):
        select(gm, [(frozen, torch.tensor([0]))])
    gm = capture(sample("relu"))
    with pytest.raises(PassError, match="the map is to scale"):
        select(gm, [(next(group for group in channel_groups(gm, Map.SCALE) if not group.reason), torch.tensor([0]))])
