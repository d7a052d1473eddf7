import pytest
import torch

import passes
from ir import edit
from ir.capture import capture
from ir.sites import layers
from passes.layerwise import QUANTILES, View, layer_rows, reads, sizes
from tests.passes.samples import Mlp, compiled, context, run, vectors


def mlp(pipeline):
    gm = capture(Mlp(), args=(vectors(),))
    _, ctx = run(gm, pipeline)
    return gm, ctx


def test_errors_are_those_of_the_stored_weights():
    exact = {name: linear.weight.detach() for name, linear in Mlp().named_children()}
    gm, ctx = mlp("annotate(scheme='W4A8'), quantize")
    rows = layer_rows(gm, View.of(gm, ctx))
    assert [row["layer"] for row in rows] == ["up", "down"]
    for row, layer in zip(rows, layers(gm), strict=True):
        codes, scale = (edit.attribute(gm, node) for node in layer.weight.all_input_nodes)
        W = exact[row["layer"]]
        assert row["error"] == pytest.approx(float((codes * scale.float() - W).norm() / W.norm()), rel=1e-3)
        assert 1e-4 < row["input error"] < 2e-2
        assert row["encoding"] == "i4[1,-1]/i8[1,-1]dynamic"
        assert row["weights"] == W.numel()


def test_what_is_not_rounded_has_no_error():
    gm, ctx = mlp("canonicalize")
    assert layer_rows(gm, View.of(gm, ctx)) == [{"layer": name, "encoding": "", "weights": 64 * 128} for name in ("up", "down")]


def test_quantiles_are_of_what_is_read_before_it_is_rounded():
    gm, ctx = mlp("annotate(scheme='W4A8'), quantize")
    x = vectors().abs().flatten().sort().values
    found = reads(gm, ctx)["up"]
    assert found.quantiles == pytest.approx([float(x[round(q * len(x) + 0.49) - 1]) for q in QUANTILES], rel=1e-4)
    empty = context(gm)
    empty.probe = [vectors()[:0]]
    assert reads(gm, empty)["up"].quantiles == []


def test_parts_add_up_to_the_whole():
    report = compiled("llama", "w4a16").report()
    assert sum(row["after"] for row in report.parts) == pytest.approx(report.coverage.stored, abs=len(report.parts))
    assert sum(row["before"] for row in report.parts) == report.coverage.total
    assert {row["part"] for row in report.parts} >= {"embed_tokens", "self_attn.q_proj", "mlp.down_proj", "input_layernorm"}


def test_shared_weights_count_once():
    assert sizes(capture(Tied(), args=(torch.zeros(2, 4, dtype=torch.int64),))) == {"table": 16 * 32 * 4}


class Tied(torch.nn.Module):
    """An embedding that is the head too."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 32)
        self.head = torch.nn.Linear(32, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def test_before_and_after_stand_side_by_side():
    report = passes.compile(capture(Mlp(), args=(vectors(),)), "w8a8").report()
    assert [row["layer"] for row in report.reads] == ["up", "down"]
    assert all(row["after"] == pytest.approx(row["before"], rel=0.1) for row in report.reads)
    smoothed = compiled("llama", "w4a16").report()
    assert len(smoothed.reads) == 2 * 4 + 1 and all(len(row["before"]) == len(row["after"]) == len(QUANTILES) for row in smoothed.reads)


def test_sizes_count_codes_scales_and_zero_points():
    gm, _ = mlp("annotate(scheme='W4A16', group=64, symmetric=False), round_weights(method='nearest')")
    assert sizes(gm) == {"up": 64 * 128 // 2 + 128 * (2 + 0.5) + 128 * 4, "down": 64 * 128 // 2 + 128 * (2 + 0.5)}
