import json
import sys

import pytest

import passes
from ir.errors import DataError, OptionError
from passes.plots import allocation, budgets, plot
from tests.families import load
from tests.passes.samples import CALIBRATION

PIPELINE = "canonicalize, untie, annotate(scheme='W4A16', group=32, symmetric=False), {}, round_weights(method='nearest')"


@pytest.fixture(scope="module")
def report():
    chosen = "assign_bits(bits=3.3, groups=(16, -1), rounding='nearest', tokens=64, measure=40)"
    made = passes.compile(load("llama").captured, PIPELINE.format(chosen), CALIBRATION).report()
    made.measures["book.txt"] = {"perplexity": 12.5, "KL from original": 0.2}
    return json.loads(json.dumps(made.to_json()))


@pytest.fixture
def folder(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_two_pictures_in_two_formats_the_same_every_time(folder):
    files = plot(folder)
    assert sorted(path.name for path in files) == ["allocation.png", "allocation.svg", "budgets.png", "budgets.svg"]
    assert all(path.stat().st_size > 1000 for path in files)
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in plot(folder)] == before


def test_every_linear_has_its_width(report):
    (axes,) = allocation(report).axes
    widths = [text.get_text().partition("·")[0] for text in axes.texts]
    assert sorted(widths) == sorted(row["encoding"][1] for row in report["tables"]["widths"])
    assert next(label.get_text() for label in axes.get_xticklabels()) == "q_proj"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]


def test_widths_of_inputs_stand_after_a_slash(report):
    rows = [{**row, "encoding": f"{row['encoding']}/i8[1,-1]dynamic"} for row in report["tables"]["widths"]]
    (axes,) = allocation({**report, "tables": {"widths": rows}}).axes
    assert all(text.get_text().endswith("/8") for text in axes.texts)
    assert "after a slash" in axes.get_xlabel()


def test_measures_stand_beside_what_was_predicted(report):
    (axes,) = budgets(report).axes
    points = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(points["result on book.txt, perplexity 12.50"]) == [0.2]
    assert list(points["measured, held-out tokens"]) == [report["tables"]["choices"][0]["measured, nats a token"]]
    assert len(points["predicted"]) == len(report["tables"]["budgets"])


def test_a_loss_that_is_no_divergence_has_none_beside_it(report):
    rows = [
        {"bits": row["bits"], "relative errors": row["nats a token"], "measured": 0.1, "chosen": row["chosen"]} for row in _budgets(report)
    ]
    (axes,) = budgets({**report, "tables": {"budgets": rows}}).axes
    assert [line.get_label() for line in axes.lines] == ["predicted", "chosen, predicted"]


def _budgets(report):
    return report["tables"]["budgets"]


def test_without_matplotlib_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match="matplotlib") as error:
        plot(folder)
    assert error.value.remedy == "pip install fxpress[plots]"


def test_folders_without_a_choice_are_refused(folder, report):
    (folder / "report.json").write_text(json.dumps({**report, "tables": {}}))
    with pytest.raises(DataError, match="no choice of widths"):
        plot(folder)
    for wrong in ("[]", "no json"):
        (folder / "report.json").write_text(wrong)
        with pytest.raises(DataError, match="not a report"):
            plot(folder)
    (folder / "report.json").unlink()
    with pytest.raises(DataError, match="not a report"):
        plot(folder)
