import json

import pytest
import torch

import passes
from ir.capture import capture
from passes.base import Skip
from passes.report import OTHERS, coverage, left_out
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, compiled, run, vectors

PIPELINES = ["w8a16", "w4a16", "w4a16(head=True)", "w8a8(dynamic=False)", "canonicalize"]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_byte_is_compressed_or_left_for_a_reason(pipeline):
    found = compiled("llama", pipeline).report().coverage
    shares = [found.share, *(size / found.total for size in found.left.values())]
    assert sum(shares) == pytest.approx(1)
    assert found.total == found.compressed + sum(found.left.values())
    assert found.stored == -(-found.bits // 8) + sum(found.left.values())
    assert found.stored <= found.total


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_tied_weights_count_once(family):
    model = load(family).model
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    for pipeline in ("w8a16", "canonicalize"):
        found = compiled(family, pipeline).report().coverage
        unread = sum(t.nbytes for name, t in model.named_buffers() if "original_inv_freq" in name)
        assert found.total == sum(tensors.values()) - unread


@pytest.mark.parametrize(
    ("pipeline", "bits"),
    [
        ("w4a16(group=64, rounding='nearest')", 4 + 16 / 64 + 4 / 64),
        ("w4a16(group=64, symmetric=True, rounding='nearest')", 4 + 16 / 64),
        ("w3a16(group=32, rounding='nearest')", 3 + 16 / 32 + 3 / 32),
        ("w2a16(group=64, rounding='nearest')", 2 + 16 / 64 + 2 / 64),
        ("w8a16", 8 + 16 / 32),
        ("w8a8", 8 + (128 * 16 + 64 * 16) / (2 * 64 * 128)),
    ],
)
def test_effective_bits_count_scales_and_zero_points(pipeline, bits):
    made = passes.compile(Mlp(), pipeline, args=(vectors(),))
    assert made.effective_bits == pytest.approx(bits, abs=1e-12)


def test_coverage_is_a_share_of_bytes():
    made = passes.compile(Mlp(), "w8a16(ignore=['down'])", args=(vectors(),))
    weights, biases = 2 * 64 * 128 * 4, 128 * 4
    assert made.coverage == (weights / 2) / (weights + biases)
    assert made.report().coverage.left == {"ignored by the recipe": weights / 2, OTHERS: biases}


def test_a_shared_weight_goes_by_its_first_reader():
    (reason,) = [reason for reason in compiled("llama_tied", "w8a16").report().coverage.left if reason != OTHERS]
    assert reason.startswith("embeddings are left out")


def test_a_model_of_bf16_has_half_the_bytes():
    made = passes.compile(Mlp().to(torch.bfloat16), "w8a16", args=(vectors().to(torch.bfloat16),))
    assert made.report().coverage.compressed == 2 * 2 * 64 * 128


def test_a_skip_ends_when_the_layer_is_quantized_after_all():
    gm = capture(Mlp(), args=(vectors(),))
    _, ctx = run(gm, "annotate(targets=['up']), annotate(targets=['down']), round_weights(method='nearest')")
    assert left_out(gm, ctx.skipped) == []
    gm = capture(Mlp(), args=(vectors(),))
    _, ctx = run(gm, "annotate(ignore=['up']), annotate(targets=['down']), round_weights(method='nearest')")
    assert [skip.path for skip in left_out(gm, ctx.skipped)] == ["up"]


def test_what_was_never_annotated_says_so():
    gm = capture(Mlp(), args=(vectors(),))
    assert coverage(gm, []).left["not annotated"] == 2 * 64 * 128 * 4
    assert coverage(gm, [Skip("up", "tired", 0)]).left["tired"] == 64 * 128 * 4


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_report_is_plain_data_and_a_page(pipeline):
    report = compiled("llama", pipeline).report()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [entry["pass"] for entry in data["passes"]] == [step.text for step in report.trace]
    assert data["coverage"]["bytes_after"] == report.coverage.stored
    assert (data["model"], data["backend"]) == ("GraphModule", "reference")
    page = str(report)
    assert all(text in page for text in ("canonicalize", "effective bits", "note: canonicalize"))


def test_the_page_shows_measures():
    report = passes.compile(Mlp(), "w8a16", args=(vectors(),)).report()
    report.measures["book.txt"] = {"perplexity": 12.5}
    assert "12.5" in str(report)


def test_predicted_divergence_stands_beside_what_was_measured():
    chosen = "canonicalize, annotate(scheme='W4A16', group=32), assign_bits(bits=4.0, rounding='nearest', tokens=64{}), round_weights"
    for loss, known in (("", True), (", loss='layer'", False)):
        report = passes.compile(load("llama").captured, chosen.format(loss), CALIBRATION).report()
        report.measures |= {"before": {"perplexity": 12.0}, "after": {"KL from original": 0.25, "same top token": 0.5}}
        rows = report.to_json()["measures"]
        assert rows["before"] == {"perplexity": 12.0}
        assert (report.predicted is not None) is known
        columns = ["KL from original", "KL predicted", "same top token"] if known else ["KL from original", "same top token"]
        assert list(rows["after"]) == columns
        assert ("KL predicted" in str(report)) is known
        assert rows["after"].get("KL predicted") == report.predicted


def test_the_page_of_a_choice_of_widths_is_short():
    chosen = "canonicalize, annotate(scheme='W4A16', group=32), assign_bits(bits=4.0, rounding='nearest', tokens=64), round_weights"
    report = passes.compile(load("llama").captured, chosen, CALIBRATION).report()
    assert len(report.to_json()["tables"]["widths"]) == 14
    page = str(report)
    assert all(words in page for words in ("widths in bits", "down_proj", "greatest contributions", "budgets, predicted"))
    assert "layers.0.self_attn.q_proj " not in page  # no row for every linear


def test_the_trace_is_the_reports():
    made = compiled("llama", "w4a16")
    assert made.trace is made.report().trace
    assert [record.effect.value for record in made.trace] == ["preserve", "annotate", "change"]
    assert made.report().difference == pytest.approx(made.trace[-1].difference, rel=1e-3)
