import json

import pytest
import torch

import passes
from ir.errors import DataError, OptionError
from ir.sites import layers
from ir.weights import stored_bits
from passes.budget.latency import FORMAT
from passes.fit_budget import FitBudget
from passes.page import picture
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import CALIBRATION, run, tokens

MARKED = "canonicalize, untie, annotate(scheme='W4A16', group=32, symmetric=False)"
QUICK = "widths=(1, 2, 3, 4, 8), groups=(16, -1), rounding='nearest', tokens=64"
SHARES = "shares=(1.0, 0.75, 0.5, 0.25), multiple=8"
FIT = f"fit_budget(memory={{}}, {SHARES}, {QUICK}, measure={{}})"
EXACT = "onnx(accuracy_level=1)"  # which multiplies in float32
NEAREST = "round_weights(method='nearest')"
MEASURED, FINISHED = "measured, nats a token", "finished, nats a token"
WEIGHTS = sum(tensor.numel() for name, tensor in load("llama").captured.state_dict().items() if "_proj" in name)


def fitted(text, before=MARKED, family="llama"):
    gm = load(family).graph()
    _, ctx = run(gm, f"{before}, {text}", CALIBRATION)
    return gm, ctx


def forms(gm):
    return {layer.path: (str(layer.mark), tuple(layer.weight.meta["val"].shape)) for layer in layers(gm) if layer.site("weight").encoding}


def used(gm):
    marked = [layer for layer in layers(gm) if layer.site("weight").encoding]
    return sum(stored_bits(tuple(layer.weight.meta["val"].shape), layer.site("weight").encoding) for layer in marked)


def predicted(ctx):
    return sum(row["nats a token"] for row in ctx.tables["widths"])


@pytest.mark.parametrize("memory", [0.05, 0.125])
def test_a_budget_is_met_from_below_also_under_one_bit(memory):
    gm, ctx = fitted(FIT.format(memory, 0))
    assert 0.99 * memory <= used(gm) / (16 * WEIGHTS) <= memory
    assert all(torch.isfinite(logits).all() for logits in load("llama").steps(gm, lengths=(7, 1, 1)))
    assert any("of the weights kept" in note for note in ctx.notes)


def test_one_whole_share_is_assign_bits():
    bits, fit = fitted(f"assign_bits(bits=2.4, {QUICK})"), fitted(f"fit_budget(memory=0.15, shares=(1.0,), {QUICK}, measure=0)")
    assert forms(bits[0]) == forms(fit[0])
    assert bits[1].tables == fit[1].tables


def test_both_together_cost_no_more_than_either():
    both = predicted(fitted(FIT.format(0.125, 0))[1])
    assert both <= predicted(fitted(f"assign_bits(memory=0.125, {QUICK})")[1])
    fixed = fitted(f"fit_budget(memory=0.125, shares=(0.5,), multiple=8, {QUICK}, measure=0)")
    assert both <= predicted(fixed[1])
    assert {row["kept"] for row in fixed[1].tables["widths"]} == {0.5}


def test_the_choice_that_measures_least_is_taken():
    gm, ctx = fitted(FIT.format(0.1, 60))
    plans = ctx.tables["plans"]
    (taken,) = [row for row in plans if row["taken"]]
    assert [row["plan"] for row in plans[:6]] == [f"rate {rate}" for rate in (1, 2, 3, 4, 16, 256)]
    assert [row["plan"] for row in plans[6:]] == [f"{share}% of all units" for share in (100, 75, 50, 25)]
    assert taken[MEASURED] == min(row[MEASURED] for row in plans)
    assert used(gm) / WEIGHTS == pytest.approx(taken["bits"])
    assert ctx.tables["choices"][0][MEASURED] == pytest.approx(taken[MEASURED])
    assert [row["weights kept"] for row in plans[:6]] == sorted(row["weights kept"] for row in plans[:6])
    again, other = fitted(FIT.format(0.1, 60))
    assert forms(again) == forms(gm) and other.tables == ctx.tables


def test_a_budget_in_bytes_counts_the_whole_model():
    text = f"{MARKED}, fit_budget(bytes=72_000, {SHARES}, {QUICK}, measure=0), {NEAREST}"
    made = passes.compile(load("llama").captured, text, CALIBRATION)
    coverage = made.report().coverage
    assert coverage.elements < WEIGHTS
    assert 0.99 * 72_000 <= coverage.stored <= 72_000


def test_a_budget_in_milliseconds_drops_units(tmp_path):
    sizes, times = range(8, 200, 8), {2: 1.0, 4: 2.0, 8: 4.0}
    rows = [[n, k, "", f"u{width}[1,-1]", n * k * time / 4096] for n in sizes for k in sizes for width, time in times.items()]
    path = tmp_path / "latencies.json"
    path.write_text(json.dumps({"format": FORMAT, "backend": "reference", "milliseconds": rows}))
    options = f"latency=9.0, latencies={str(path)!r}, {SHARES}, widths=(2, 4, 8), groups=(-1,), rounding='nearest', tokens=64, measure=0"
    made = passes.compile(load("llama").captured, f"{MARKED}, fit_budget({options}), {NEAREST}", CALIBRATION)
    chosen = forms(made.graph)
    taken = sum(n * k * times[int(mark[1 + mark.index("u")])] / 4096 for mark, (n, k) in chosen.values())
    assert made.report().coverage.elements < WEIGHTS  # two bits everywhere take longer
    assert 0.97 * 9.0 <= taken <= 9.0


def test_shares_that_the_budget_has_no_room_for_are_no_plans():
    _, ctx = fitted(FIT.format(0.05, 60))
    tried = [row["plan"] for row in ctx.tables["plans"][6:]]
    assert "100% of all units" not in tried and tried[-1] == "25% of all units"


def test_kept_shares_are_shown_beside_widths():
    _, ctx = fitted(FIT.format(0.0625, 0))
    (table,) = picture.widths(ctx.tables["widths"])
    assert "share of weights kept" in str(table.title)
    assert any("%" in str(cell) for column in table.columns for cell in column.cells)


def test_a_budget_that_is_too_small_names_the_least_that_works():
    with pytest.raises(OptionError, match="no choice fits") as error:
        fitted(FIT.format(0.01, 0))
    least = float(error.value.remedy.split("memory=")[1].split(",")[0])
    gm, _ = fitted(FIT.format(least, 0))
    assert used(gm) / (16 * WEIGHTS) <= least < 0.04


def test_units_of_linears_that_are_not_annotated_stay():
    before = "canonicalize, untie, annotate(scheme='W4A16', group=32, symmetric=False, ignore=['down_proj'])"
    gm, ctx = fitted(FIT.format(0.11, 0), before)
    assert {shape for path, (_, shape) in forms(gm).items() if "mlp" in path} == {(96, 64)}
    assert any("not all linears" in note and "% of the weight bytes" in note for note in ctx.notes)


def test_the_result_runs_with_its_cache_on_onnx():
    fit = "fit_budget(memory=0.2, shares=(0.75, 0.5), multiple=8, widths=(4, 8), rounding='nearest', tokens=64, measure=0)"
    text = f"{MARKED}, {fit}, {NEAREST}"
    made = passes.compile(load("llama").captured, text, CALIBRATION, backend=EXACT)
    oracle = made.lowered("reference")
    assert min(row["kept"] for row in made.report().tables["widths"]) < 1
    past = None, None
    for ids in (tokens(2, 6), tokens(2, 1), tokens(2, 1, seed=3)):
        first, second = (run(input_ids=ids, past_key_values=cache) for run, cache in zip((oracle, made), past, strict=True))
        assert relative_error((second.logits,), (first.logits,)) < 1e-4
        past = first.past_key_values, second.past_key_values


def test_the_preset_goes_from_end_to_end():
    options = f"memory=0.125, prune=True, {QUICK.replace(', tokens=64', '').replace(chr(39) + 'nearest', chr(39) + 'learned')}"
    made = passes.compile(load("llama").captured, f"mixed({options}, steps=2, own_text=False, measure=24)", CALIBRATION)
    coverage = made.report().coverage
    assert 0.99 * 0.125 <= coverage.bits / (16 * WEIGHTS) <= 0.125
    assert torch.isfinite(made(input_ids=tokens(2, 6)).logits).all()


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, fit_budget")
    with pytest.raises(OptionError, match="rounded already"):
        fitted(FIT.format(0.125, 0), "canonicalize, untie, annotate(scheme='W4A4'), quantize(weights=False)")
    wrong = ({"shares": ()}, {"shares": (0.0,)}, {"shares": (1.5,)}, {"criterion": "luck"}, {"multiple": 0}, {"memory": 0.1, "bytes": 9})
    for options in wrong:
        with pytest.raises(OptionError):
            FitBudget(**options)


def test_choices_are_measured_after_what_follows():
    finish = "round_weights(method='nearest')"
    gm, ctx = fitted(f"{FIT.format(0.1, 60)[:-1]}, finish={finish!r})")
    plans = ctx.tables["plans"]
    assert len({row[MEASURED] for row in plans}) > 1
    (taken,) = [row for row in plans if row["taken"]]
    tried = {row["plan"]: row for row in plans if row[FINISHED] != ""}
    assert 1 < len(tried) < len(plans)
    assert taken[FINISHED] == min(row[FINISHED] for row in tried.values())
    assert used(gm) / WEIGHTS == pytest.approx(taken["bits"])
    for row in plans:  # ruled out is what another beats
        better = [own for own in tried.values() if own["weights kept"] >= row["weights kept"] and own[MEASURED] <= row[MEASURED]]
        assert better if row["plan"] not in tried else better == [row]
    for row in tried.values():  # rounded to nearest both times, but refitted block after block only behind what follows
        assert row[FINISHED] != row[MEASURED] and 0.5 < row[FINISHED] / row[MEASURED] < 2
    with pytest.raises(OptionError, match="is measured"):
        FitBudget(finish=finish, measure=0)
    with pytest.raises(OptionError, match="no pass"):
        FitBudget(finish="nothing_of_the_kind")
