"""The pre-flight as a whole: it changes nothing, it fails as the compile would, and what it estimates can be checked."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

import passes
from ir.capture import capture
from ir.errors import BackendError
from passes import registry
from passes.commands.cli import app
from passes.preflight.plan import LARGE, wanted, weight_bytes
from passes.preflight.resources import size_of
from tests.passes.preflight.test_part import DEPTH, deep
from tests.passes.samples import tokens

BATCHES = [tokens(seed=seed) for seed in range(5)]
ROUND = "w4a16(group=32, rounding='nearest')"


@pytest.fixture(scope="module")
def captured():
    return capture(deep("llama"))


@pytest.mark.parametrize("backend", ["reference", pytest.param("onnx", marks=pytest.mark.thorough), "hf"])
def test_the_size_of_the_result_is_known_before(captured, tmp_path, backend):
    found = passes.estimate(captured, ROUND, BATCHES, backend, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert (found.layers, found.rehearsed) == (DEPTH, 1)
    assert [step.name for step in found.steps][-3:] == ["checks between passes", f"lower to {backend}", "write"]
    compiled = passes.compile(captured, ROUND, BATCHES, backend)
    compiled.executable.save(tmp_path)
    assert found.written == pytest.approx(size_of(tmp_path), rel=0.02)


def test_a_pre_flight_changes_nothing_and_is_reported(captured):
    plain = passes.compile(captured, ROUND, BATCHES)
    looked = passes.compile(captured, ROUND, BATCHES, preflight=True)
    assert "estimates" not in plain.report().tables
    rows = looked.report().tables["estimates"]
    assert [row["step"] for row in rows] == [*map(str, (r.text for r in looked.trace)), "checks between passes", "lower to reference"]
    assert all(row["seconds"] >= 0 and row["seconds estimated"] >= 0 for row in rows)
    assert plain.report().notes == looked.report().notes
    for a, b in zip(plain.graph.buffers(), looked.graph.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "pipeline",
    [
        "canonicalize, annotate(group=32, ignore=['re:model.layers.3.*', 'model.layers.4.mlp.up_proj']), round_weights(method='nearest')",
        "canonicalize, prune(share=0.2, what=['layers'], criterion='magnitude', compensate=False), w8a16",
        "canonicalize, annotate(group=32), assign_bits(memory=0.2), round_weights(method='nearest')",
        pytest.param(
            "canonicalize, annotate(scheme='W4A8'), learn(steps=50), learn_rounding(steps=50), quantize", marks=pytest.mark.thorough
        ),
        "canonicalize, annotate(group=32), round_weights(method='nearest'), quantize_cache",
    ],
)
def test_what_only_the_whole_can_have_is_no_error_of_a_part(captured, pipeline):
    if "memory" in pipeline:
        pipeline = pipeline.replace("memory=0.2", f"bytes={weight_bytes(captured) // 3}")
    assert passes.estimate(captured, pipeline, BATCHES).total > 0


def test_files_of_the_whole_are_not_written(captured, tmp_path):
    file = tmp_path / "statistics.safetensors"
    passes.estimate(captured, f"canonicalize, annotate(scheme='W8A8', dynamic=False), observe(file='{file}'), quantize", BATCHES)
    assert not file.exists()


@dataclass(frozen=True)
class Broken:
    """A backend that cannot lower anything."""

    name = "broken"

    def supports(self, operator, encodings, shape):
        return None

    def lower(self, gm, probe, notes):
        raise BackendError(f"it has {len(list(gm.graph.nodes))} nodes", remedy="none")

    def load(self, directory):
        raise NotImplementedError


class Said:
    """Progress that is kept."""

    def __init__(self):
        self.lines = []

    def track(self, items, doing):
        self.lines.append(doing)
        return items

    def say(self, text):
        self.lines.append(text)

    def show(self, page):
        self.lines.append(page.title)


def test_an_error_of_the_backend_comes_before_the_work(captured):
    said = Said()
    with pytest.raises(BackendError, match="nodes"):
        passes.compile(captured, ROUND, BATCHES, Broken(), preflight=True, progress=said)
    assert not any("round_weights" in line for line in said.lines)


def test_large_models_have_one_and_small_ones_where_asked(captured):
    assert not wanted(captured, None) and wanted(captured, True)
    large = torch.nn.Linear(1, LARGE // 8, bias=False, device="meta")
    gm = capture(torch.nn.Linear(2, 2), (torch.zeros(2, 2),))
    gm.weight = torch.nn.Parameter(torch.empty(0))
    assert not wanted(gm, None)
    gm.weight = large.weight
    assert weight_bytes(gm) == LARGE // 2 + 8


def test_models_that_cannot_be_cut_have_none():
    with warnings.catch_warnings():
        compiled = passes.compile(torch.nn.Linear(32, 32), "w8a16", preflight=True, args=(torch.randn(4, 32),))
    assert any("too few layers" in note for note in compiled.report().notes)
    assert registry.backend("reference").name == "reference"


def test_a_dry_run_prints_and_writes_nothing(checkpoint, tmp_path):
    model = deep("llama")
    model.save_pretrained(tmp_path / "model")
    arguments = [
        "compile",
        str(tmp_path / "model"),
        "--pipeline",
        "w8a16",
        "--backend",
        "reference",
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 5 layers" in result.stdout and "round_weights" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
