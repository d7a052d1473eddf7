import json
from dataclasses import replace

import pytest
import torch

from backends.triton_gpu import select
from backends.triton_gpu.select import Config
from ir.errors import DataError
from tools import tune_kernels
from tools.gpu import timing
from tools.gpu.candidates import TUNED, candidates
from tools.gpu.cases import Outcome
from tools.gpu.problems import Problem
from tools.gpu.targets import FORMATS


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two forms, which the library reads too."""
    forms = [
        {
            "arch": 90,
            "bits": 4,
            "per_weight": 2.0,
            "registers": 128,
            "shared": 32768,
            "config": {"tile_m": tile_m, "tile_n": 128, "spans": 2},
        }
        for tile_m in (8, 64)
    ]
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({"forms": forms, "timed": []}))
    monkeypatch.setattr(tune_kernels, "TABLE", path)
    monkeypatch.setattr(select, "_table", lambda: json.loads(path.read_text()))
    return path


def test_a_dry_run_writes_a_table_that_is_gone_on_with_and_read(table, tmp_path, monkeypatch, capsys):
    before, written = table.read_text(), tmp_path / "made_up.json"
    assert tune_kernels.main(["--dry", "--out", str(written), "--formats", "W4A16", "--tokens", "1"]) == 0
    assert "0 of 4 problems" not in capsys.readouterr().out
    assert table.read_text() == before
    rows = json.loads(written.read_text())["timed"]
    assert [(row["m"], row["n"], row["k"]) for row in rows] == [(1, 4096, 4096), (1, 8192, 8192), (1, 14336, 4096), (1, 16384, 16384)]
    monkeypatch.setattr(select, "_table", lambda: json.loads(written.read_text()))
    chosen = select.choose("packed_linear", 4, 1, 14336, 4096, 128, 90)
    assert chosen == Config(**rows[2]["config"]) and rows[2]["us"] == 99


def test_the_table_is_not_written_with_made_up_figures(table, capsys):
    assert tune_kernels.main(["--dry", "--out", str(table)]) == 2
    assert "made up" in capsys.readouterr().err


def test_a_row_takes_the_place_of_one_of_another_device_and_is_not_tuned_again(table):
    problem = Problem(FORMATS["W4A16"], 256, 128, 1, torch.bfloat16)
    one, other = (tune_kernels.Here(name, 90, "2", "3") for name in ("H100", "H200"))
    tune_kernels.put(table, problem, one, Config(stages=2), 3.0)
    assert tune_kernels.row_of(table, problem, one) and not tune_kernels.row_of(table, problem, other)
    tune_kernels.put(table, problem, other, Config(stages=4), 2.0)
    (row,) = json.loads(table.read_text())["timed"]
    assert (row["device"], row["config"]["stages"]) == ("H200", 4)
    assert len(json.loads(table.read_text())["forms"]) == 2


def test_what_is_wrong_is_not_timed_and_what_does_not_compile_is_no_error(table, tmp_path, monkeypatch, capsys):
    outcomes = iter(["wrong", "OutOfResources: shared memory", ""])

    def run(cases, *_):
        return [Outcome("a form", said, said.startswith("Out")) for _, said in zip(cases, outcomes, strict=False)]

    timed = []
    monkeypatch.setattr(tune_kernels, "run", run)
    monkeypatch.setattr(tune_kernels, "made_up", lambda problem, found, budget: (timed.append(len(found)), ({}, []))[1])
    monkeypatch.setattr(tune_kernels, "TRIED_DRY", 3)
    monkeypatch.setattr(tune_kernels, "problems", lambda tokens: [(FORMATS["W4A16"], 4096, 4096, 1)])
    assert tune_kernels.main(["--dry", "--out", str(tmp_path / "made_up.json")]) == 1
    assert timed == [1] and "WRONG: a form: wrong" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["W4A16", "W4A8"])
def test_launchers_take_forms_and_the_fastest_that_is_right_is_kept(name, monkeypatch):
    problem = Problem(FORMATS[name], 256, 64, 2, torch.float16)
    forms = [replace(form, split=1) for form in starts(problem)]
    forms.append(replace(forms[0], split=2))
    ticks = iter([5.0, 3.0, 4.0, 3.5])
    monkeypatch.setattr(timing, "ROTATED", 1)
    monkeypatch.setattr(tune_kernels, "AGAIN", 1)
    monkeypatch.setattr(tune_kernels, "timed", lambda calls, replays=0: (calls[0](), timing.Timing(next(ticks), 0.1, 20))[1])
    times, wrong = tune_kernels.clocked(torch.device("cpu"), problem, forms[:1] + forms[2:], timing.Budget(1e4))
    assert wrong == [] and times == {forms[2]: 4.0}


def starts(problem):
    if problem.case.int8:
        return TUNED["packed_linear_int8"].starts(problem, 90)
    return [Config(tile_m=8, tile_n=64), Config(tile_m=16, tile_n=64)]


def test_forms_differ_in_one_field_from_those_of_the_model(table):
    problem = Problem(FORMATS["W4A16"], 4096, 4096, 1, torch.bfloat16)
    found = candidates(TUNED["packed_linear"], problem, 90)
    first = found[0]
    assert len(found) == len(set(found)) and 15 < len(found) < 40
    assert all(sum(getattr(one, name) != getattr(first, name) for name in vars(first)) <= 1 for one in found[:13])
    other = Problem(FORMATS["W3A16"], 4096, 4096, 1, torch.bfloat16)  # of a width that was not counted
    assert candidates(TUNED["packed_linear"], other, 90)[0].tile_m == 8
    with pytest.raises(DataError, match="kernel_counts --write"):
        candidates(TUNED["packed_linear"], problem, 80)
    known = Config(tile_m=16, stages=5)
    assert candidates(TUNED["packed_linear"], problem, 90, known)[0] == known
