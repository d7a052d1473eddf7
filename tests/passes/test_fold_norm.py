import pytest
import torch
from torch import nn

from ir import evaluate
from ir.capture import capture
from ir.match import aten, find
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import CALIBRATION, context, run


class Normed(nn.Module):
    """A norm, read by linears, and by the sum where `shared`."""

    def __init__(self, norm, bias=False, shared=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.shared = norm, shared
        self.a, self.b = nn.Linear(16, 8, bias=bias), nn.Linear(16, 16)
        for parameter in norm.parameters():
            parameter.data = torch.randn_like(parameter)
        self.to(dtype)

    def forward(self, x):
        y = self.norm(x)
        return self.a(y), self.b(y) + (y if self.shared else x)


def folded(model):
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    gm = capture(model, args=(x,))
    before = evaluate.run(gm, [x])
    (_, record), ctx = run(gm, "canonicalize, fold_norm")
    return gm, record, ctx.notes, relative_error(evaluate.run(gm, [x]), before)


def gains(gm):
    return sum(len(node.args) > 2 and node.args[2] is not None for node in find(gm, aten.rms_norm.default, aten.layer_norm.default))


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm, nn.LayerNorm, lambda size: nn.LayerNorm(size, bias=False)], ids=["rms", "layer", "layer-no-bias"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_gain_and_bias_move_into_the_readers(norm, bias):
    gm, record, _, difference = folded(Normed(norm(16), bias, dtype=torch.float64))
    assert record.sites == 1
    assert gains(gm) == 0
    assert difference < 1e-12


def test_bf16_weights_are_rounded_once():
    gm, record, _, difference = folded(Normed(nn.LayerNorm(16), dtype=torch.bfloat16))
    assert record.sites == 1
    assert {tensor.dtype for tensor in gm.parameters()} == {torch.bfloat16}
    assert difference < 0.02


def test_a_norm_that_something_else_reads_is_kept_with_a_note():
    gm, record, notes, _ = folded(Normed(nn.RMSNorm(16), shared=True))
    assert (record.sites, gains(gm)) == (0, 1)
    assert any("kept the norm" in note and "not only linears read it" in note for note in notes)


def test_a_norm_without_gain_is_left_without_a_word():
    _, record, notes, _ = folded(Normed(nn.LayerNorm(16, elementwise_affine=False)))
    assert record.sites == 0
    assert not any("fold_norm" in note for note in notes)


def test_quantized_readers_are_refused():
    gm = load("llama").graph()
    records, ctx = run(gm, "canonicalize, untie, annotate, round_weights(method='nearest'), fold_norm")
    assert records[-1].sites == 1  # the last norm, which only the head reads
    assert any("quantized already" in note for note in ctx.notes)


@pytest.mark.parametrize(
    ("family", "pipeline", "sites", "kept"),
    [
        ("llama", "fold_norm", 5, ""),
        ("llama_tied", "fold_norm", 4, "shared with another layer"),
        ("llama_tied", "untie, fold_norm", 5, ""),
        ("gemma2", "untie, fold_norm", 5, "not only linears"),  # of 9: those after attention and MLP feed the residual stream
        ("gpt2", "untie, fold_norm", 5, ""),
    ],
)
def test_families_fold_what_linears_read(family, pipeline, sites, kept):
    gm = load(family).graph()
    before = load(family).steps(gm)
    ctx = context(gm, CALIBRATION)
    records, _ = run(gm, f"canonicalize, {pipeline}", ctx=ctx)
    assert records[-1].sites == sites
    assert any(kept in note for note in ctx.notes)
    assert all(relative_error((a,), (b,)) < 1e-4 for a, b in zip(load(family).steps(gm), before, strict=True))


class Watched(nn.Module):
    """A weight that something other than a layer reads."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16), nn.Linear(16, 16)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.linear(self.norm(x)) * self.linear.weight.sum()


def test_a_weight_that_something_else_reads_stays():
    _, record, notes, difference = folded(Watched())
    assert (record.sites, difference) == (0, 0)
    assert any("something else than a layer" in note for note in notes)
