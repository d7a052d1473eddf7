"""Whole models: families, presets, prefill and chained steps, against the graph that was compiled."""

import pytest
import torch

import passes
from backends.triton_gpu import Triton
from backends.triton_gpu import lower as lowering
from ir.canonical import canonicalize
from ir.errors import BackendError, CoverageError
from tests.backends.onnx_qdq.conftest import branches, quantized
from tests.families import VOCABULARY

HALF, FULL = torch.float16, torch.float32
FAMILIES = {
    # family: dtype, weights, activations, greatest relative difference of logits: a code on the other side of a rounding moves them
    "qwen2": (HALF, "u4[1,64]", None, 2e-3),  # the graph rounds weights to float16 too, over two layers
    "gemma3": (FULL, "u3[1,32]", "u8[1,-1]dynamic", 1e-2),
    "phi3": (FULL, "i4[1,-1]", "i8[1,-1]dynamic", 1e-2),
    "gpt2": (FULL, "i1[1,32]", "u8[-1]", 1e-2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_prefill_and_chained_steps(families, name):
    dtype, weight, activation, allowed = FAMILIES[name]
    family = families(name, dtype)
    gm = family.graph()
    canonicalize(gm)
    assert quantized(gm, {"Linear": (weight, activation), "Embedding": ("i8[1,-1]", None)}) > 4
    executable = Triton().lower(gm, gm.meta["example"], [])
    report = executable.report()
    assert report["probe_difference"] <= allowed and report["decoding"] == "a cache of fixed size"
    assert sum(row["share"] for row in report["operators"]) == pytest.approx(1)
    for ours, oracle in zip(family.steps(executable.gm, lengths=(7, 1, 1)), family.steps(gm, lengths=(7, 1, 1)), strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - oracle.double()).norm() / oracle.double().norm()) <= allowed


def text(count: int = 2) -> list[torch.Tensor]:
    return [torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


ROWS = ("norm_quantize_rows", "hadamard_quantize_rows", "quantize_rows", "quantize_static")
PRESETS = {
    # preset: operators that run, and those that prepare what they read
    "w2a16": ({"packed_linear"}, set()),
    "w8a16(head=True, embeddings=True)": ({"packed_linear", "packed_embedding"}, set()),
    "w8a8(dynamic=False)": ({"packed_linear_int8"}, {"quantize_static"}),
    "w4a4(rounding='nearest', transform='rotate', cache=4)": ({"packed_linear_int8"}, set(ROWS[:3])),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run_through_operators_on_packed_weights(families, preset):
    runs, prepares = PRESETS[preset]
    compiled = passes.compile(families("llama").graph(), preset, calibration=text(), backend="triton")
    rows = {row["operator"].removeprefix("fxpress."): row for row in compiled.executable.report()["operators"]}
    assert set(rows) == {*runs, lowering.FLOATING}
    assert sum(rows[name]["share"] for name in runs) == pytest.approx(compiled.coverage)
    found = {node.target for node in compiled.executable.gm.graph.nodes}
    assert {name for name in ROWS if getattr(torch.ops.fxpress, name).default in found} == prepares
    assert any("eager bodies" in note for note in compiled.report().notes)


def test_parts_of_a_linear_in_several_widths_are_launches_of_their_own(families):
    pipeline = (
        "canonicalize, annotate(scheme='W2A16'), split_channels(high='W8A16', share=0.25, multiple=8, by='activation'), "
        "round_weights(method='nearest')"
    )
    compiled = passes.compile(families("llama").graph(), pipeline, calibration=text(), backend="triton")
    sites = compiled.executable.report()["sites"]
    assert {site["weight"] for site in sites} == {"i2[1,-1]", "i8[1,-1]"} and len(sites) > 14
    assert compiled.executable.report()["probe_difference"] < 1e-5


def test_what_has_no_place_is_refused_before_any_rounding(families):
    with pytest.raises(CoverageError, match=r"groups of 16.*use groups of 32"):
        passes.compile(families("llama").graph(), "w4a16(group=16)", calibration=text(), backend="triton")


def test_outputs_beyond_the_tolerance_are_an_error(monkeypatch):
    monkeypatch.setattr(lowering, "fuse", lambda gm, notes: (branches({"a": ("i8[1,32]", None)}), []))
    with pytest.raises(BackendError, match="differ from the graph's"):
        Triton().lower(branches({"a": ("i2[1,32]", None)}), [torch.randn(2, 5, 96)], [])


def test_a_dequantized_constant_that_other_operators_read_is_noted():
    gm = branches({"a": ("i4[1,32]", None), "b": ("i4[1,32]", None)})
    (first, _) = (node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    with gm.graph.inserting_before(first):
        transposed = gm.graph.call_function(torch.ops.aten.t.default, (first.args[1],))
        product = gm.graph.call_function(torch.ops.aten.matmul.default, (first.args[0], transposed))
    for node in (transposed, product):
        node.meta["val"] = first.meta["val"]
    first.replace_all_uses_with(product)
    gm.graph.erase_node(first)
    gm.recompile()
    notes = []
    report = Triton().lower(gm, [torch.randn(2, 5, 96)], notes).report()
    assert [row["operator"] for row in report["operators"]] == ["fxpress.packed_linear", lowering.UNPACKED, lowering.FLOATING]
    assert any("dequantized at every call" in note for note in notes)
