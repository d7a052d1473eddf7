"""Laws by effect, over every registered pass: a pass is tested the moment it is registered."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch

import passes
from ir.capture import capture
from ir.text import graph_text
from ir.verify import verify
from passes import registry
from passes.base import Effect
from passes.pipeline import Pipeline
from passes.probe import model_outputs, relative_error
from tests.families import build, load
from tests.passes.samples import CALIBRATION, context, run, same_weights, weights
from tests.wide import in_float64

FAMILIES = ("llama_tied", "gpt2", "gemma2")

# What has to run before a pass; passes not named here run on the canonical graph.
BEFORE = {
    "fold_norm": "untie",
    "center_norm": "untie, fold_norm",
    "balance_channels": "untie",
    "learn": "untie, fold_norm, center_norm, annotate(scheme='W4A4')",
    "clip_activations": "untie, annotate(scheme='W4A4')",
    "smooth_channels": "untie, fold_norm",
    "rotate_channels": "untie, fold_norm, center_norm",
    "split_channels": "untie, annotate(scheme='W4A4')",
    "learn_masks": "untie, annotate(scheme='W4A4')",
    "assign_bits": "untie, annotate(scheme='W4A16', group=32)",
    "fit_budget": "untie, annotate(scheme='W4A16', group=32)",
    "tune": "untie, annotate(scheme='W4A16', group=32), round_weights(method='nearest')",
    "round_weights": "untie, annotate(scheme='W4A16', group=32)",
    "learn_rounding": "untie, annotate(scheme='W2A16', group=32, symmetric=False)",
    "quantize": "untie, annotate",
}
# Options to test beside the defaults, with what has to run before where that differs.
OPTIONS = [
    ("prune(share=0.5, multiple=1, criterion='magnitude', uniform=False, compensate=False)", ""),
    ("prune(share=0.3, multiple=4, what=['mlp'], criterion='wanda', bias=True)", "untie, fold_norm"),
    ("prune(share=0.25, what=['inputs', 'outputs'], criterion='wanda', bias=True)", ""),
    ("prune(share=0.5, what=['layers'])", ""),
    ("annotate(scheme='W4A16', group=32, symmetric=False, head=True, embeddings=True)", ""),
    ("annotate(dynamic=False, ignore=('re:.*\\\\.0\\\\..*',))", ""),
    ("observe(gram=True)", ""),
    ("round_weights(method='nearest')", "annotate(scheme='W3A16', group=32, symmetric=False, embeddings=True, head=True)"),
    ("round_weights(method='guided', groups=2)", "annotate(scheme='W2A16', group=32, symmetric=False)"),
    ("round_weights(method='yaqa', sweeps=1)", "annotate(scheme='W2A16', group=32, symmetric=False)"),
    ("round_weights(method='qronos')", "annotate(scheme='W2A16', group=32, symmetric=False)"),
    ("round_weights(act_order=True)", "annotate(scheme='W2A16', group=32, symmetric=False)"),
    ("quantize(quantile=0.99)", "annotate(dynamic=False), observe"),
    ("quantize", "annotate(scheme='W4A4')"),
    ("smooth_channels(search=True, rotated=True)", "untie, fold_norm, annotate(scheme='W4A4')"),
    ("smooth_channels(mean=True, alpha=1.0, where=('mlp', 'values'))", "untie, observe"),
    ("balance_channels(online=True, block=16)", "untie"),
    ("learn(parts=['rotations', 'clips'], steps=4, rows=1)", "untie, fold_norm, center_norm, annotate(scheme='W4A8')"),
    ("learn(loss='block', steps=2)", "untie, fold_norm, annotate(scheme='W4A16', group=32, symmetric=False)"),
    ("assign_bits(bits=6.0, widths=('W4A4', 'W8A8'), rounding='nearest', tokens=64)", "untie, annotate(scheme='W8A8', group=32)"),
    ("quantize_cache(bits=9.6, widths=(2, 4, 8, 16), tokens=64)", ""),
    ("rotate_channels(where=('R1', 'R2', 'R3', 'R4'), kind='orthogonal', block=16, seed=1)", "untie, fold_norm, center_norm"),
]
# They compose, or split what was whole the first time; the others find nothing the second time.
MAPS = {"smooth_channels", "rotate_channels", "balance_channels", "learn", "split_channels", "learn_masks"}
SHORT = {
    "sample_text": "sample_text(windows=3, length=5)",
    "learn": "learn(steps=3, rows=1)",
    "assign_bits": "assign_bits(bits=3.1)",
    "fit_budget": "fit_budget(memory=0.2, shares=(1.0, 0.5), multiple=8, widths=(2, 4), rounding='nearest', tokens=64, measure=0)",
    "learn_rounding": "learn_rounding(steps=3)",
    "learn_masks": "learn_masks(steps=2, rows=1)",
    "tune": "tune(steps=3)",
    "prune": "prune(share=0.2, multiple=2)",
}  # instead of the defaults, to be quick
CASES = [(SHORT.get(name, name), BEFORE.get(name, "")) for name in registry.passes()] + OPTIONS


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request):
    text, before = request.param
    (step,) = Pipeline.parse(text)
    return step, before


@cache
def original(family, before):
    gm = load(family).graph()
    ctx = context(gm, CALIBRATION)
    run(gm, f"canonicalize, {before}", ctx=ctx)
    return gm, ctx


def prepared(family, step, before):
    """A graph that the pass can run on, and its context; canonicalize itself gets the graph as captured."""
    if step.name() == "canonicalize":
        return load(family).graph(), context(load(family).captured, CALIBRATION)
    gm, ctx = original(family, before)
    return capture(gm), copy.copy(ctx)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_keeps_the_promise_of_its_effect(case, family):
    step, before = case
    gm, ctx = prepared(family, step, before)
    text, marked, kept, outputs = graph_text(gm, annotations=False), graph_text(gm), weights(gm), load(family).steps(gm)
    (record,), _ = run(gm, step, ctx=ctx)
    verify(gm)
    found = load(family).steps(gm)
    if step.effect in {Effect.OBSERVE, Effect.ANNOTATE}:
        assert graph_text(gm, annotations=False) == text
        assert all(kept[name] is tensor for name, tensor in weights(gm).items())
        assert (graph_text(gm) == marked) == (step.effect is Effect.OBSERVE)
        assert record.difference is None
    elif step.effect is Effect.PRESERVE:
        assert all(relative_error((a,), (b,)) <= 1e-4 for a, b in zip(found, outputs, strict=True))
        (again,), _ = run(gm, step, ctx=ctx)
        assert again.sites == 0 or step.name() in MAPS
    assert all(torch.isfinite(output).all() for output in found)


@pytest.mark.parametrize("family", FAMILIES[:1])
def test_a_pass_does_the_same_twice(case, family):
    step, before = case
    graphs = []
    for _ in range(2):
        gm, ctx = prepared(family, step, before)
        run(gm, step, ctx=ctx)
        graphs.append(gm)
    assert graph_text(graphs[0]) == graph_text(graphs[1])
    assert same_weights(*graphs)


class Doubling(torch.nn.Module):
    """No layers, and so no channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.tanh()


@pytest.mark.parametrize("name", [name for name, kind in registry.passes().items() if kind.effect is Effect.PRESERVE and name != "learn"])
def test_a_pass_on_a_graph_without_groups_returns_zero(name):
    gm = capture(Doubling(), (torch.randn(4, 8),))
    run(gm, "canonicalize")
    records, _ = run(gm, name, [torch.randn(4, 8)])
    assert records[-1].sites == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("gemma2", marks=pytest.mark.thorough)])
def test_passes_that_keep_the_function_keep_it_in_float64(family):
    gm = capture(build(family, torch.float64))
    before = model_outputs(gm, gm.meta["example"])
    run(gm, "canonicalize")
    assert relative_error(model_outputs(gm, gm.meta["example"]), before) <= 1e-6  # models compute norms in float32 even so
    gm = in_float64(gm)
    canonical = model_outputs(gm, gm.meta["example"])
    for name, kind in registry.passes().items():
        if kind.effect is Effect.PRESERVE:
            run(gm, f"{BEFORE.get(name, 'untie')}, {SHORT.get(name, name)}", CALIBRATION)
            assert relative_error(model_outputs(gm, gm.meta["example"]), canonical) <= 1e-9, name


def test_the_callers_model_stays_bit_identical():
    model = build("llama_tied").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.model.layers[0].mlp.eval()
    training = [module.training for module in model.modules()]
    attributes = [Counter(vars(module)) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    passes.compile(model, "canonicalize, untie, fold_norm, observe, w4a16(head=True, embeddings=True)", CALIBRATION)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == training
    assert [Counter(vars(module)) for module in model.modules()] == attributes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_pass_prints_as_text_that_parses_to_itself(case):
    step, _ = case
    assert Pipeline.parse(str(step)) == Pipeline((step,))


@pytest.mark.parametrize("kind", registry.passes().values(), ids=registry.passes())
def test_a_pass_states_effect_and_docstring(kind):
    assert isinstance(kind.effect, Effect)
    assert (kind.__doc__ or "").partition("\n")[0].endswith(".")
    assert kind.name() == kind.name().lower()
