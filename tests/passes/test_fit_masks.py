from dataclasses import replace

import pytest
import torch

import passes
from backends.onnx_qdq import OnnxQdq
from ir import evaluate
from ir.errors import DataError, OptionError
from passes import presets
from passes.fit_masks import FitMasks
from passes.pruning.unit_masks import call_gated, factors_of
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, context, run, vectors

MARKED = "canonicalize, untie, annotate(scheme='W2A16')"
SHORT = "high='W4A16', steps=2, rows=1"


def fitted(family, options, **more):
    return passes.compile(load(family).captured, f"{MARKED}, fit_masks({SHORT}, {options}), round_weights", CALIBRATION, **more)


def share_of_fp16(made, whole=61440):
    return made.report().coverage.bits / (16 * whole)


@pytest.mark.parametrize("memory", [0.05, 0.12, 0.24])
def test_the_budget_is_met_from_below(memory):
    made = fitted("llama", f"memory={memory}, multiple=1")
    assert 0.99 * memory < share_of_fp16(made) <= memory
    (note,) = [note for note in made.report().notes if "of FP16" in note]
    assert f"{share_of_fp16(made):.4f} of FP16" in note


def test_a_budget_in_bits_and_a_fixed_share():
    made = fitted("llama", "bits=1.6, kept=0.5, multiple=1")
    assert 0.99 * 1.6 < 16 * share_of_fp16(made) <= 1.6
    assert 0.49 < made.report().coverage.elements / 61440 <= 0.5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "llama_tied"])
@pytest.mark.parametrize("what", [("mlp", "inputs", "outputs"), ("mlp", "heads"), ("inputs",), ("outputs",), ("mlp",)])
def test_what_is_left_is_the_masked_model(family, what):
    gm = load(family).graph()
    run(gm, MARKED)
    ctx = context(gm, CALIBRATION)
    step = FitMasks("W4A16", what=what, kept=0.6, bits=1.9, multiple=2, compensate=False)
    masks, _ = step._masks(gm)
    drawn = torch.Generator().manual_seed(0)
    taken = masks.settled([torch.randn(size, generator=drawn) for size in masks.masks], 1.9, 0.6)
    assert 0.5 < masks.left(taken) / masks.weights <= 0.6 or len(what) == 1
    gates = [torch.zeros(own.size).index_fill(0, stay, 1.0) for own, stay in zip(masks.units, taken.units, strict=True)]
    reads, writes = factors_of(masks.units, gates)

    def called(node):
        return lambda *given: call_gated(node.target, reads.get(node), writes.get(node), *given)

    outputs = list(gm.graph.output_node().args[0])[:1]
    given = evaluate.bind(gm, ctx.probe)
    masked = evaluate.evaluate(
        gm, evaluate.calls_for(gm, outputs), given, outputs, instead={node: called(node) for node in {*reads, *writes}}
    )
    left = masks.left(taken)
    step._drop(gm, ctx, taken.units)
    assert sum(layer.layer.node.args[1].meta["val"].numel() for layer in masks.linears) == left
    assert (evaluate.run(gm, ctx.probe)[0] - masked[outputs[0]]).abs().max() < 1e-5


def test_channels_that_say_nothing_go():
    model, x = Mlp().eval(), vectors(rows=64)
    model.up.weight.data[::2] = 0
    model.up.bias.data[::2] = 0
    learned = "fit_masks(what=['mlp'], kept=0.5, bits=3.0, steps=150, rate=0.05, rows=64, multiple=1, strength=0.1)"
    made = passes.compile(model, f"canonicalize, annotate(scheme='W4A16'), {learned}", [(x,)], args=(x,))
    parts = [tensor for name, tensor in made.graph.named_parameters() if name.startswith("up") and tensor.ndim == 2]
    rows = torch.cat(parts, 1)
    assert len(rows) == 64
    assert (rows.abs().sum(1) > 0).float().mean() > 0.9


def test_onnx_runs_it_with_a_cache():
    made = fitted("llama", "memory=0.12, multiple=8", backend=OnnxQdq(accuracy_level=1))
    assert made.report().target["probe_difference_exact"] < 1e-4
    ids = CALIBRATION[0]["input_ids"][:2, :6]
    first = made(ids[:, :4])
    assert (made(ids[:, 4:], past_key_values=first.past_key_values).logits - made(ids).logits[:, 4:]).abs().max() < 1e-3


def test_the_same_seed_learns_the_same():
    first, second = (fitted("llama", "memory=0.12").graph.state_dict() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, fit_masks")
    with pytest.raises(OptionError, match="least budget is memory="):
        run(load("llama").graph(), f"{MARKED}, fit_masks(memory=0.01)", CALIBRATION)
    with pytest.raises(OptionError, match="least budget is"):
        run(load("llama").graph(), f"{MARKED}, fit_masks(memory=0.06, kept=0.9, steps=1)", CALIBRATION)
    with pytest.raises(OptionError, match="causal"):
        run(load("bert").graph(), f"{MARKED}, fit_masks(loss='cross_entropy')", CALIBRATION)
    for options in ({"high": "W9A9"}, {"memory": 1.0}, {"kept": 1.0}, {"loss": "none"}, {"steps": 0}, {"what": "blocks"}):
        with pytest.raises(OptionError):
            FitMasks(**options)


@pytest.mark.parametrize("rounding", ["learned", "gptq"])
def test_the_preset_goes_from_end_to_end(rounding):
    whole = presets.mixed(
        memory=0.2, widths=(2, 4), solver="masks", prune=True, rounding=rounding, steps=2, own_text=False, transform="none"
    )
    quick = [replace(step, steps=2, rows=1, multiple=1) if isinstance(step, FitMasks) else step for step in whole]
    made = passes.compile(load("llama").captured, quick, CALIBRATION)
    assert 0.99 * 0.2 < share_of_fp16(made) <= 0.2
