from collections import Counter

import pytest
import torch
from torch import nn

from ir import edit, evaluate
from ir.blocks import blocks
from ir.capture import capture
from ir.sites import layers
from ir.store import Store
from passes.data.sweep import Sweep, room_of
from tests.families import load
from tests.passes.samples import run, tokens, vectors

WHOLE, LEAST = 1 << 40, 1  # room for all rows and blocks, and for one row of one block


def cotangent(sizes):
    """The same gradients for the same rows of outputs, whatever the pieces."""
    generator, drawn = torch.Generator().manual_seed(0), {}

    def slope(node, value):
        if node not in drawn:
            drawn[node] = torch.randn(sizes[0], *value.shape[1:], generator=generator)
        start = sizes[1]
        return drawn[node][start : start + len(value)]

    return slope


def gradients(gm, batch, watched, room):
    """Of each watched call, with the value that goes along, over all rows."""
    found, sizes = {}, [len(batch[0]), 0]
    slope, sweep = cotangent(sizes), Sweep(gm, watched, room=room)
    for piece in sweep.pieces(batch):
        sweep.run(piece, slope, lambda node, x, g: found.setdefault(node, []).append((x.clone(), g.clone())))
        sizes[1] += len(piece[0])
    return {node: [torch.cat(side) for side in zip(*pairs, strict=True)] for node, pairs in found.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_the_same_in_pieces_and_parts(family):
    gm = load(family).graph()
    run(gm, "canonicalize, untie")
    watched = {layer.node: layer.node.args[0] for layer in layers(gm) if layer.kind == "Linear"}
    batch = gm.meta["signature"].bind(input_ids=tokens(3, 12))
    whole, least = (gradients(gm, batch, watched, room) for room in (WHOLE, LEAST))
    assert list(whole) == list(least)
    assert set(whole) == set(watched)
    for node in whole:
        for one, other in zip(whole[node], least[node], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_gradients_are_those_of_autograd():
    gm = load("llama").graph()
    run(gm, "canonicalize, untie")
    node = next(layer.node for layer in layers(gm) if layer.path.endswith("0.mlp.up_proj"))
    batch = gm.meta["signature"].bind(input_ids=tokens(2, 12))
    ((_, found),) = gradients(gm, batch, {node: node}, LEAST).values()
    sweep, values = Sweep(gm, {node: node}), {}

    def tap(at, value):
        if at is node:
            values[at] = value.requires_grad_()

    (out,) = sweep.outputs
    logits = evaluate.evaluate(gm, evaluate.calls_for(gm, [out]), evaluate.bind(gm, batch), [out], tap, grad=True)[out]
    (expected,) = torch.autograd.grad(logits, values[node], cotangent([2, 0])(out, logits.detach()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_parts_before_the_first_that_is_watched_run_once_and_without_gradients(monkeypatch):
    gm = load("llama").graph()
    run(gm, "canonicalize, untie")
    nodes = [layer.node for layer in layers(gm) if layer.kind == "Linear"]
    sweep, runs = Sweep(gm, {nodes[-2]: nodes[-2]}, room=LEAST), []  # the last MLP's end; the head follows
    original = evaluate.evaluate

    def counted(gm, calls, *rest, grad=False, **options):
        runs.append((set(calls), grad))
        return original(gm, calls, *rest, grad=grad, **options)

    monkeypatch.setattr(evaluate, "evaluate", counted)
    sweep.run(gm.meta["signature"].bind(input_ids=tokens(1, 8)), lambda node, value: torch.ones_like(value), lambda *_: None)
    assert [grad for calls, grad in runs if nodes[0] in calls] == [False]
    assert [grad for calls, grad in runs if nodes[-1] in calls] == [True]
    assert runs[-1][1] and nodes[-2] in runs[-1][0]
    assert all(len(set(nodes) & calls) <= 4 for calls, _ in runs)


class Normed(nn.Module):
    """What comes before the first linear is outside of the stream, and each block reads it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.tanh(x)
        x = x + self.first(x).relu()
        return x + self.second(x).relu()


@pytest.mark.parametrize("room", [WHOLE, LEAST])
def test_weights_on_disk_are_counted_on_the_way_back_too(room, tmp_path, monkeypatch):
    gm = load("llama").graph()
    run(gm, "canonicalize, untie")
    own, counted = Store(tmp_path), []
    monkeypatch.setattr(Store, "count", lambda self, size: counted.append(size))
    gm.meta[edit.STORE] = own
    batch, watched = gm.meta["signature"].bind(input_ids=tokens(2, 12)), {layers(gm)[1].node: layers(gm)[1].node}
    _, cut = blocks(gm)
    sweep = Sweep(gm, watched, room=room)
    evaluate.evaluate(gm, evaluate.calls_for(gm, sweep.outputs), evaluate.bind(gm, batch), list(sweep.outputs))
    forward, first = list(counted), next(index for index, block in enumerate(cut) if layers(gm)[1].node in block.nodes)
    spans = [{node for call in block.nodes for node in call.all_input_nodes} for block in cut[first + 1 :]]
    back = [sum(edit.value(node).nbytes for node in span if node.op == "get_attr") for span in spans]
    counted.clear()
    sweep.run(batch, cotangent([2, 0]), lambda node, x, g: None)
    # Each weight on the way there, and those of a block together on the way back, as far as gradients go.
    assert not Counter([*forward, *back]) - Counter(counted)
    assert len(back) > 2 and not set(back) & set(forward)


def test_what_is_watched_outside_of_the_stream_has_its_whole_gradient():
    gm = capture(Normed(), args=(vectors(width=8),))
    node = next(node for node in gm.graph.nodes if "tanh" in str(node.target))
    whole, least = (gradients(gm, [vectors(rows=4, width=8)], {node: node}, room) for room in (WHOLE, LEAST))
    torch.testing.assert_close(whole[node][1], least[node][1])


def test_room_grows_with_the_model():
    small, wide = nn.Linear(4, 4, bias=False), nn.Linear(64, 64, bias=False)
    assert room_of(small, 1000, 2) == 1000
    assert room_of(wide, 1000, 2) == 64 * 64 * 4 // 2
