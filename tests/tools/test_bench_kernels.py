import json
import pickle
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest
import torch

from ir.errors import BackendError
from tools import bench_kernels
from tools.gpu import checks, timing
from tools.gpu.cases import run
from tools.gpu.checks import Linear, check, described
from tools.gpu.checks_rows import Cache, Hadamard, Rows
from tools.gpu.problems import Problem
from tools.gpu.report import Found, markdown
from tools.gpu.targets import FORMATS, OURS, ROWS, TORCH, Key, verdicts
from tools.peers import gpu_kernels

CPU = torch.device("cpu")


def test_a_dry_run_checks_and_writes_a_report_that_says_it_is_made_up(tmp_path, capsys):
    assert bench_kernels.main(["--dry", "--out", str(tmp_path), "--seed", "3"]) == 0
    said, report = capsys.readouterr().out, (tmp_path / "kernels.md").read_text()
    assert "MADE-UP FIGURES" in said and "# Kernels on one MADE-UP GPU" in report
    assert "| W4A16, 8192 × 8192, M = 1, against torch bf16 | ≥ 2.6 (3) |" in report
    assert "made_up_kernel" in report and "humming: not installed" in report
    kept = json.loads((tmp_path / "kernels.json").read_text())
    assert kept["checked"] > 200 and len(kept["verdicts"]) > 60 and kept["ceilings"]["copy"] > 0
    panels = ElementTree.parse(tmp_path / "kernels.svg").getroot().findall("{http://www.w3.org/2000/svg}g")
    assert len(panels) == 10


def test_made_up_figures_stay_out_of_results(capsys):
    assert bench_kernels.main(["--dry", "--out", str(bench_kernels.RESULTS)]) == 2
    assert "made up" in capsys.readouterr().err


def test_no_gpu_is_no_bench(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="remedy: run it on a machine with an NVIDIA GPU"):
        timing.require_gpu()


def test_a_wrong_operator_ends_the_run_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_kernels, "cases", lambda of: [Broken(Linear(4, 3, 8, 64, 32, torch.float16), lambda y: y * 1.1)])
    assert bench_kernels.main(["--dry", "--out", str(tmp_path)]) == 1
    assert "WRONG: 1 checks failed" in capsys.readouterr().out and not any(tmp_path.iterdir())


@pytest.fixture
def found(monkeypatch):
    """Nothing measured yet; what measures is replaced by one call and a made-up time, on small problems."""
    monkeypatch.setattr(timing, "ROTATED", 1)
    monkeypatch.setattr(timing, "ceilings", lambda device: timing.Ceilings(1e12, 1e14, 2.0))
    monkeypatch.setattr(bench_kernels, "timed", lambda calls, replays: (calls[-1](), timing.Timing(10.0, 1.0, replays))[1])
    monkeypatch.setattr(bench_kernels, "profile", lambda *_: pytest.fail("no target is missed"))
    monkeypatch.setattr(bench_kernels, "problems", lambda: [(FORMATS["W4A16"], 256, 128, 1), (FORMATS["W8A8"], 256, 128, 32)])
    monkeypatch.setattr(bench_kernels, "WIDE", (64, 64))
    monkeypatch.setattr(bench_kernels, "ROTATION_TOKENS", (1,))
    monkeypatch.setattr(bench_kernels, "ROTATIONS", {"torch eager": gpu_kernels.eager_rotation})
    return Found({}, "", "bfloat16", 0)


def test_everything_is_measured_and_peers_that_fail_say_why(found):
    assert bench_kernels.measured(found, CPU, timing.Budget(1e4)) == []
    bench_kernels.compared(found, CPU, timing.Budget(1e4), list(gpu_kernels.PEERS))
    assert {(key.format, key.M, key.who) for key in found.timings} == {
        ("W4A16", 1, OURS),
        ("bf16", 1, TORCH),
        ("W8A8", 32, OURS),
        ("bf16", 32, TORCH),
        ("W8A8", 32, "torch int8"),
        ("Hadamard + quantize", 1, OURS),
        ("Hadamard + quantize", 1, "torch eager"),
    }
    assert any("at W4A16, 256 × 128, M = 1" in reason for reason in found.absent["tinygemm"])  # it has no CPU kernel
    assert any("not installed" in reason for reason in found.absent["gemlite"])
    assert found.shares[Key("W4A16", 256, 128, 1, OURS)] == pytest.approx((256 * 128 / 2 + 2 * 128 * 2 + 2 * 256 + 2 * 128) / 1e7)


def test_without_time_problems_are_left_out_by_name(found):
    assert bench_kernels.measured(found, CPU, timing.Budget(0)) == []
    bench_kernels.compared(found, CPU, timing.Budget(0), ["torch int8"])
    assert found.left_out[0] == "W4A16, 256 × 128, M = 1" and "W8A8, 256 × 128, M = 32: torch int8" in found.left_out
    assert "for want of time" in markdown(found)


def test_a_result_that_is_wrong_at_its_own_shape_ends_the_run(found, monkeypatch):
    monkeypatch.setattr(bench_kernels, "operator", lambda case, given: 2 * case.call(given)[0])
    (wrong,) = bench_kernels.measured(found, CPU, timing.Budget(1e4))
    assert wrong.case == "W4A16, 256 × 128, M = 1" and not found.timings


def test_what_an_operator_raises_is_reported_and_what_the_profiler_raises_is_noted(found, monkeypatch):
    monkeypatch.setattr(bench_kernels, "profile", lambda *_: 1 / 0)
    monkeypatch.setattr(Found, "worst", lambda found: [Key("W4A16", 256, 128, 1, OURS)])
    assert bench_kernels.measured(found, CPU, timing.Budget(1e4)) == []
    assert "ZeroDivisionError" in "".join(found.absent["torch.profiler"])
    monkeypatch.setattr(bench_kernels, "timed", lambda *_: 1 / 0)
    (wrong,) = bench_kernels.measured(found, CPU, timing.Budget(1e4))
    assert "ZeroDivisionError" in wrong.wrong


@dataclass(frozen=True)
class Broken:
    """A case whose first output is spoilt."""

    case: object
    spoil: object

    def inputs(self, draw):
        return self.case.inputs(draw)

    def call(self, given):
        first, *others = self.case.call(given)
        return self.spoil(first.clone()), *others

    def judge(self, given, made):
        return self.case.judge(given, made)


def at(place, change):
    def spoil(y):
        y[place] = change(y[place])
        return y

    return spoil


CASES = [
    Linear(4, 5, 24, 96, 32, torch.float16, zero=True, bias=True),
    Linear(3, 5, 24, 96, 32, torch.bfloat16),
    Linear(4, 5, 24, 96, 96, torch.float32, int8=True, input_zero=True),
    Rows(4, 64, "i8[1,-1]dynamic", torch.float16),
    Rows(4, 64, "u8[1,-1]dynamic*0.9", torch.float16, block=64),
    Rows(4, 64, "i4[1,-1]dynamic", torch.bfloat16, norm=True),
    Hadamard(4, 96, 32, torch.bfloat16),
    Cache((2, 3, 64), "u4[1,32]dynamic", torch.float16, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case).__name__ + str(case.dtype))
def test_checks_pass_what_is_right_and_see_one_wrong_element(case):
    assert check(case, 5, CPU) == ""
    assert check(Broken(case, at((1, -1), lambda y: y + (1 if y.is_floating_point() else 100))), 5, CPU)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_checks_see_what_is_not_finite_and_a_column_of_the_weight_left_out(case):
    assert "not finite" in check(Broken(case, at((0, 3), lambda y: y * torch.nan)), 5, CPU)
    given = case.inputs(torch.Generator().manual_seed(5))
    short = given | {"x": given["x"].index_fill(1, torch.tensor([95]), 0)}
    assert case.judge(given, case.call(given)) == ""
    assert case.judge(given, case.call(short))


def test_of_a_large_weight_some_rows_are_judged(monkeypatch):
    monkeypatch.setattr(checks, "EASY", 10)
    monkeypatch.setattr(checks, "SAMPLED", 8)
    assert check(CASES[0], 5, CPU) == ""
    assert " of 40 elements" in check(Broken(CASES[0], lambda y: y * 1.1), 5, CPU)


def test_peers_that_run_anywhere_multiply_by_the_same_weight(monkeypatch):
    monkeypatch.setattr(timing, "ROTATED", 1)
    for peer, name, off in [(gpu_kernels.torch_bf16, "W3A16", 0.01), (gpu_kernels.int_mm, "W8A8", 1e-6)]:
        problem = Problem(FORMATS[name], 256, 128, 32, torch.bfloat16)
        given = problem.inputs(0, CPU)
        prepared = peer(problem, given)
        assert len(prepared.calls) == 2
        assert all(problem.distance(given, prepared.finished(call())) < off for call in prepared.calls)
    with pytest.raises(gpu_kernels.Absent, match="alone"):
        gpu_kernels.int_mm(Problem(FORMATS["W4A16"], 256, 128, 32, torch.bfloat16), {})


def test_what_is_allocated_holds_no_numbers():
    with timing.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert (torch.ones(2).new_empty(2, dtype=torch.uint8) == timing.GARBAGE).all()
    assert "new_empty" not in vars(torch.Tensor)


def test_targets_are_met_missed_and_stretched():
    ours, theirs = Key("W4A16", 4096, 4096, 1, OURS), Key("bf16", 4096, 4096, 1, TORCH)
    for microseconds, said in [(5.0, "met, stretched"), (5.4, "met"), (6.2, "**missed**")]:
        (found,) = verdicts({theirs: 11.0, ours: microseconds}, {})
        assert (found.wanted, found.said) == ("≥ 1.8 (2.2)", said)
    (found,) = verdicts({Key("Hadamard + quantize", 8192, 0, 16, OURS): 4.0}, {})
    assert (found.wanted, found.said, found.reached) == ("≤ 3", "**missed**", 0.75)
    assert [row.format for row in ROWS] == ["W4A16", "W4A16", "W4A16", "W8A16", "W3A16", "W2A16", "W4A8"]


def test_a_budget_shortens_what_is_repeated():
    assert timing.Budget(100).replays() == timing.WANTED
    assert timing.Budget(0).replays() == timing.REPLAYS


def test_after_a_broken_gpu_nothing_more_is_run_in_its_process(monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    outcomes = run([CASES[0], Broken(CASES[1], broken), CASES[2]], 5, CPU, 0, timing.Budget(10))
    assert [each.raised for each in outcomes] == [False, True, True]
    assert outcomes[2].wrong == "not run, after: CUDA error"


def test_cases_that_several_processes_check_keep_their_order(monkeypatch):
    monkeypatch.setattr("tools.gpu.cases.ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    outcomes = run(pickle.loads(pickle.dumps(CASES)), 5, CPU, 2, timing.Budget(200))  # as they go to a process
    assert [each.case for each in outcomes] == [described(case) for case in CASES] and not any(each.wrong for each in outcomes)


def test_a_process_that_dies_is_reported(monkeypatch):
    class Died(ThreadPoolExecutor):
        def submit(self, *_):
            raised = Future()
            raised.set_exception(BrokenExecutor("killed"))
            return raised

    monkeypatch.setattr("tools.gpu.cases.ProcessPoolExecutor", lambda workers, mp_context: Died(workers))
    assert all("its process ended" in each.wrong for each in run(CASES, 5, CPU, 2, timing.Budget(200)))
