import json

import pytest

import passes
from backends.onnx_qdq import OnnxQdq
from ir.errors import DataError, OptionError
from passes.budget.latency import FORMAT, LatencyTable
from tests.families import load
from tests.passes.samples import CALIBRATION, context

KINDS = [(64, 64, "", "u4[1,32]"), (64, 64, "i8[1,-1]dynamic", "i8[1,-1]")]
MARKED = "canonicalize, untie, annotate(scheme='W4A16', group=32, symmetric=False)"


def table(folder, times):
    """A file that says how long linears of the family take: by the width of the weight."""
    shapes = [(64, 64), (32, 64), (128, 64), (64, 128), (96, 64), (64, 96), (160, 64), (64, 160), (176, 64), (64, 176)]
    rows = [[n, k, "", f"u{width}[1,32]", n * k * time / 4096] for n, k in shapes for width, time in times.items()]
    path = folder / "latencies.json"
    path.write_text(json.dumps({"format": FORMAT, "backend": "reference", "milliseconds": rows}))
    return path


def assigned(path, latency):
    pipeline = f"{MARKED}, assign_bits(latency={latency}, latencies={str(path)!r}, widths=(2, 4, 8), rounding='nearest', tokens=64)"
    return passes.compile(load("llama").captured, f"{pipeline}, round_weights(method='nearest')", CALIBRATION)


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_a_table_is_measured_and_kept(backend, tmp_path):
    target = passes.registry.backend(backend)
    ctx = context(load("llama").graph())
    made = LatencyTable.measured(ctx, target, KINDS)
    assert list(made.milliseconds) == KINDS
    assert all(time > 0 for time in made.milliseconds.values())
    made.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json", target.name, KINDS) == made


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    path = table(tmp_path, {4: 1.0})
    for backend, kinds, match in (("onnx", [], "are of reference"), ("reference", KINDS, "lack")):
        with pytest.raises(DataError, match=match):
            LatencyTable.load(path, backend, kinds)
    path.write_text("{}")
    with pytest.raises(DataError, match="no table"):
        LatencyTable.load(path, "reference", [])


def test_a_budget_in_milliseconds_is_met(tmp_path):
    path = table(tmp_path, {2: 1.0, 4: 2.0, 8: 4.0})
    found = {latency: assigned(path, latency) for latency in (16.0, 26.0)}
    bits = [made.effective_bits for made in found.values()]
    assert bits[0] < bits[1]
    for latency, made in found.items():
        (note,) = [note for note in made.report().notes if "ms a token" in note]
        assert float(note.split(": ")[1].split()[0]) <= latency


def test_what_is_slow_on_the_target_is_not_chosen(tmp_path):
    path = table(tmp_path, {2: 3.0, 4: 2.0, 8: 4.0})  # no kernel for two bits worth the name
    rows = assigned(path, 34.0).report().tables["widths"]
    assert not any(row["encoding"].startswith("u2") for row in rows)


def test_a_latency_counts_inputs_too(tmp_path):
    path = table(tmp_path, {4: 1.0})
    data = json.loads(path.read_text())
    data["milliseconds"] += [[n, k, "i8[1,-1]dynamic", w, 0.1 * time] for n, k, _, w, time in data["milliseconds"]]
    path.write_text(json.dumps(data))
    chosen = "assign_bits(latency={}, latencies={!r}, widths=('W4A16', 'W4A8'), rounding='nearest', tokens=64)"
    found = []
    for latency in (1.5, 7.0, 15.1):
        pipeline = f"{MARKED}, {chosen.format(latency, str(path))}, round_weights(method='nearest'), quantize"
        rows = passes.compile(load("llama").captured, pipeline, CALIBRATION).report().tables["widths"]
        found.append(sum("/i8" in row["encoding"] for row in rows))
    assert found[0] == len(rows) > found[1] > found[2] == 0


def test_it_refuses_what_it_cannot_do(tmp_path):
    path = table(tmp_path, {2: 1.0, 4: 2.0, 8: 4.0})
    with pytest.raises(OptionError, match="least budget is latency="):
        assigned(path, 0.001)
    for text in ("assign_bits(latency=1.0)", "assign_bits(latency=1.0, bytes=10, latencies='x')", "assign_bits(latency=-1.0)"):
        with pytest.raises(OptionError):
            passes.Pipeline.parse(text)


def test_latencies_are_those_of_the_backend_that_is_compiled_for(tmp_path):
    path = table(tmp_path, {2: 1.0, 4: 2.0, 8: 4.0})
    pipeline = f"{MARKED}, assign_bits(latency=20.0, latencies={str(path)!r}, widths=(2, 4, 8)), round_weights"
    with pytest.raises(DataError, match="not of onnx"):
        passes.compile(load("llama").captured, pipeline, CALIBRATION, backend=OnnxQdq())


@pytest.mark.parametrize("time", ["0", "-1", "1e999", "NaN", "1" + "0" * 400, '"x"', "[" * 10_000])
def test_times_that_are_none_are_refused(tmp_path, time):
    file = tmp_path / "table.json"
    file.write_text(f'{{"format": "fxpress-latency-1", "backend": "onnx", "milliseconds": [[4, 4, "", "i4[1,-1]", {time}]]}}')
    with pytest.raises(DataError):
        LatencyTable.load(file, "onnx", [])
