"""Memory that runs out: whole batches and portions of them give the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import passes
from ir import edit, evaluate
from ir.errors import DataError
from ir.sites import layers
from passes.data.observation import observed
from passes.data.portions import Portions, out_of_memory
from passes.data.prefix import Prefix
from passes.data.still import still_inputs
from tests.families import distinct_first, load
from tests.passes.samples import CALIBRATION, run, tokens

TOO_MUCH = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
LINEARS = {torch.ops.aten.addmm.default: 1, torch.ops.aten.mm.default: 0, torch.ops.aten.linear.default: 0}  # where their input is


class Scarce(TorchDispatchMode):
    """Linears of more than some samples find no memory; from the `after`-th call on."""

    def __init__(self, tokens: int, after: int = 5) -> None:
        super().__init__()
        self.tokens, self.left = tokens, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = LINEARS.get(func)
        if place is not None:
            self.left -= 1
            if self.left < 0 and args[place][..., 0].numel() > self.tokens:
                raise RuntimeError(TOO_MUCH)
        return func(*args, **(kwargs or {}))


def prepared(family="llama"):
    gm = load(family).graph()
    _, ctx = run(gm, "canonicalize, untie", CALIBRATION)
    return gm, ctx, {layer.node: layer for layer in layers(gm) if layer.kind == "Linear" and layer.path != "lm_head"}


def test_torch_says_in_this_way_that_memory_runs_out():
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(found.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("family", distinct_first())
@pytest.mark.parametrize("inputs_of", [lambda *given: Prefix(*given).inputs("test"), lambda *given: still_inputs(*given, "test")])
def test_inputs_of_layers_are_the_same_in_portions(family, inputs_of):
    gm, ctx, pending = prepared(family)
    whole = {found.layers[0].path: found for found in inputs_of(gm, ctx, pending)}
    tokens = ctx.calibration[0][0].numel()
    ctx.notes.clear()
    with Scarce(tokens // 2):
        parts = {found.layers[0].path: found for found in inputs_of(gm, ctx, pending)}
    assert any("memory ran out" in note for note in ctx.notes)
    assert whole.keys() == parts.keys()
    for path, found in whole.items():
        torch.testing.assert_close(parts[path].gram, found.gram, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts[path].mean, found.mean, rtol=1e-5, atol=1e-6)


def test_statistics_count_every_token_once():
    gm, ctx, _ = prepared()
    whole = observed(gm, ctx)
    with Scarce(ctx.calibration[0][0].numel() // 2):
        parts = observed(gm, ctx)
    assert any("memory ran out" in note for note in ctx.notes)
    for path, found in whole.items():
        assert parts[path].count == found.count
        torch.testing.assert_close(parts[path].mean, found.mean)
        torch.testing.assert_close(parts[path].maximum, found.maximum)


def test_one_sample_that_does_not_fit_is_an_error_that_says_what_to_do():
    gm, ctx, pending = prepared()
    with Scarce(0), pytest.raises(DataError, match="memory runs out on one sample") as found:
        list(Prefix(gm, ctx, pending).inputs("test"))
    assert "smaller batches" in found.value.remedy


def test_a_graph_that_mixes_samples_is_not_divided():
    class Mixes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x.transpose(0, 1))

    gm = passes.compile(Mixes(), "canonicalize", args=(torch.randn(3, 4, 8),)).graph
    ctx = passes.Context([[torch.randn(4, 5, 8)]])
    (entry,) = evaluate.placeholders(gm)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    moved = next(node for node in calls if edit.value(node).shape[0] != edit.value(entry).shape[0])
    with Scarce(0, after=0), pytest.raises(DataError, match="keep samples apart"):
        Portions(gm, ctx, rows=2).run(calls, {entry: ctx.calibration[0][0], moved: ctx.calibration[0][0].transpose(0, 1)}, [calls[-1]])


def test_a_compile_goes_on_and_tells():
    gm, batches = load("llama").captured, [tokens(16, seed=1)]
    whole = passes.compile(gm, "w4a16(group=32)", batches)
    with Scarce(batches[0].numel() // 2, after=0):
        parts = passes.compile(gm, "w4a16(group=32)", batches)
    assert any("at a time" in note for note in parts.report().notes)
    same = [torch.equal(a, b) for a, b in zip(whole.graph.buffers(), parts.graph.buffers(), strict=True)]
    assert sum(same) > 0.9 * len(same)  # a code that lies between two may fall to the other side


def test_memory_that_runs_out_elsewhere_says_what_to_do():
    class Hungry(passes.Pass):
        effect = passes.Effect.OBSERVE

        def run(self, gm, ctx):
            raise RuntimeError(TOO_MUCH)

    with pytest.raises(DataError, match="memory runs out") as found:
        passes.compile(load("llama").captured, [Hungry()], CALIBRATION)
    assert "smaller batches" in found.value.remedy
