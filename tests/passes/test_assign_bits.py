import pytest

from ir.errors import CoverageError, DataError, OptionError
from ir.sites import layers
from ir.weights import stored_bits
from passes.assign_bits import AssignBits
from passes.canonicalize import Canonicalize
from passes.page import picture
from passes.report import coverage
from tests.families import load
from tests.passes.samples import CALIBRATION, context, run

MARKED = "canonicalize, untie, annotate(scheme='W4A16', group=32, symmetric=False)"


def assigned(text, backend=None, before=MARKED):
    gm = load("llama").graph()
    ctx = context(gm, CALIBRATION)
    run(gm, before, ctx=ctx)
    ctx.backend = backend
    run(gm, text, ctx=ctx)
    return gm, ctx


def counted(gm):
    """Bits and weights of the annotated linears."""
    marked = [layer for layer in layers(gm) if layer.site("weight").encoding]
    shapes = [tuple(layer.weight.meta["val"].shape) for layer in marked]
    used = sum(stored_bits(shape, layer.site("weight").encoding) for shape, layer in zip(shapes, marked, strict=True))
    return used, sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize(("bits", "fused"), [(2.6, True), (3.3, False), (4.6, True), (6.0, False)])
def test_a_budget_is_met_from_below(bits, fused):
    gm, ctx = assigned(f"assign_bits(bits={bits}, groups=(16, 32, -1), fused={fused})")
    used, weights = counted(gm)
    assert 0.97 * bits <= used / weights <= bits
    assert any(f"{used / weights:.3f} bits a weight" in note for note in ctx.notes)
    assert len(ctx.tables["widths"]) == 14


def test_what_reads_one_tensor_shares_its_encoding():
    gm, _ = assigned("assign_bits(bits=3.4)")
    by_path = {layer.path: str(layer.site("weight").encoding) for layer in layers(gm)}
    for index in range(2):
        attention, mlp = (f"model.layers.{index}.{part}." for part in ("self_attn", "mlp"))
        assert len({by_path[f"{attention}{name}_proj"] for name in "qkv"}) == 1
        assert by_path[f"{mlp}gate_proj"] == by_path[f"{mlp}up_proj"]


def test_all_the_budget_there_is_buys_the_greatest_width():
    gm, _ = assigned("assign_bits(bits=9.0, widths=(2, 8))")
    assert {layer.site("weight").encoding.bits for layer in layers(gm) if layer.site("weight").encoding} == {8}


def test_bytes_are_those_of_the_whole_model():
    gm, _ = assigned("assign_bits(bytes=100_000)")
    _, ctx = run(gm, "round_weights(method='nearest')", CALIBRATION)
    assert 95_000 <= coverage(gm, ctx.skipped).stored <= 100_000


def test_a_budget_that_is_too_small_names_the_least_that_works():
    with pytest.raises(OptionError, match="no choice") as error:
        assigned("assign_bits(bits=2.0)")
    least = float(error.value.remedy.split("bits=")[1].split(",")[0])
    assigned(f"assign_bits(bits={least}, rounding='nearest')")
    with pytest.raises(OptionError, match="no choice") as error:
        assigned("assign_bits(bytes=1000)")
    assert "bytes=" in error.value.remedy


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("assign_bits(bits=1.9)", "bits=2 at least"),
        ("assign_bits(memory=0.1)", "memory=0.125 at least"),
        ("assign_bits(bits=3.5, widths=('W4A4', 'W8A8'))", "bits=4 at least"),
        ("fit_budget(memory=0.1, shares=(1.0,))", "memory=0.125 at least"),
    ],
)
def test_a_budget_below_all_widths_is_refused_before_any_pass_runs(text, remedy, monkeypatch):
    monkeypatch.setattr(Canonicalize, "run", lambda self, gm, ctx: pytest.fail("a pass ran"))
    with pytest.raises(OptionError, match="no choice fits") as error:
        run(load("llama").graph(), f"{MARKED}, {text}", CALIBRATION)
    assert remedy in error.value.remedy


def test_costs_are_kept_for_another_budget(tmp_path):
    file = tmp_path / "costs.json"
    first, _ = assigned(f"assign_bits(bits=3.0, file={str(file)!r})")
    again = load("llama").graph()
    run(again, f"{MARKED}, assign_bits(bits=3.0, file={str(file)!r})")  # without calibration data
    assert [str(a.site("weight").encoding) for a in layers(first)] == [str(b.site("weight").encoding) for b in layers(again)]
    with pytest.raises(DataError, match="lack"):
        run(load("llama").graph(), f"{MARKED}, assign_bits(bits=6.0, widths=(5, 6), file={str(file)!r})")
    with pytest.raises(DataError, match="were made with"):
        run(load("llama").graph(), f"{MARKED}, assign_bits(bits=3.0, loss='layer', file={str(file)!r})")
    file.write_text("[]")
    with pytest.raises(DataError, match="table of costs"):
        run(load("llama").graph(), f"{MARKED}, assign_bits(bits=3.0, file={str(file)!r})")


MEASURED = "assign_bits(bits=2.9, groups=(16, 32, -1), rounding='nearest', tokens=64, measure=60{})"


def test_what_was_measured_is_in_the_tables():
    gm, ctx = assigned(MEASURED.format(""))
    (choice,) = ctx.tables["choices"]
    assert choice["measured, nats a token"] > 0
    sites = ctx.tables["contributions"]
    assert len(sites) == 8 and sum(row["weights"] for row in sites) == counted(gm)[1]
    assert sum(row["measured, nats a token"] for row in sites) == pytest.approx(choice["measured, nats a token"], rel=0.5)
    assert sum(row["predicted, nats a token"] for row in sites) == pytest.approx(choice["predicted, nats a token"])
    assert len(ctx.tables["interactions"]) == 15
    (chosen,) = [row for row in ctx.tables["budgets"] if row["chosen"]]
    assert chosen["measured"] == choice["measured, nats a token"]
    assert chosen["bits"] == pytest.approx(counted(gm)[0] / counted(gm)[1])
    assert any("KL on held-out tokens" in note for note in ctx.notes)


def test_corrections_keep_what_measured_least():
    gm, ctx = assigned(MEASURED.replace("2.9", "2.7").format(", corrections=3"))
    choices = ctx.tables["choices"]
    assert 1 < len(choices) <= 4
    (taken,) = [row for row in choices if row["taken"]]
    assert taken["measured, nats a token"] == min(row["measured, nats a token"] for row in choices)
    assert counted(gm)[0] / counted(gm)[1] == pytest.approx(taken["bits"])
    assert taken["bits"] <= 2.7
    assert ctx.tables == assigned(MEASURED.replace("2.9", "2.7").format(", corrections=3"))[1].tables  # bit for bit


def test_nothing_is_measured_unless_asked_for():
    _, ctx = assigned("assign_bits(bits=3.4, rounding='nearest', tokens=64)")
    assert set(ctx.tables) == {"widths", "contributions", "budgets"}
    assert all(row["measured"] is None for row in ctx.tables["budgets"])
    assert sum(row["nats a token"] for row in ctx.tables["widths"]) == pytest.approx(
        sum(row["predicted, nats a token"] for row in ctx.tables["contributions"])
    )


def test_a_file_does_not_hide_what_was_held_out(tmp_path):
    file = f", file={str(tmp_path / 'costs.json')!r}"
    assigned(MEASURED.format(file))
    assigned(MEASURED.format(file))
    with pytest.raises(DataError, match="were made with"):
        assigned(MEASURED.replace("measure=60", "measure=0").format(file))


def test_the_backend_is_asked_before():
    class Narrow:
        name = "narrow"

        def supports(self, kind, encodings, shape):
            return None if encodings["weight"].bits == 4 else "four bits only"

    gm, _ = assigned("assign_bits(bits=8.0)", backend=Narrow())
    assert {layer.site("weight").encoding.bits for layer in layers(gm) if layer.site("weight").encoding} == {4}
    with pytest.raises(CoverageError, match="no width"):
        assigned("assign_bits(bits=8.0, widths=(2, 8))", backend=Narrow())


BAD = [
    {"bits": 0.0},
    {"bytes": -5},
    *(
        {"bits": 2, **wrong}
        for wrong in (
            {"widths": ()},
            {"widths": (9,)},
            {"widths": ("W4A5",)},
            {"widths": (4, "W4A4", True)},
            {"groups": (0,)},
            {"loss": "l2"},
            {"measure": -1},
            {"corrections": -1},
            {"corrections": 1},
        )
    ),
]


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        AssignBits(**options)


BOTH = "canonicalize, untie, annotate(scheme='W4A4', group=32, symmetric=False)"
PAIRS = "assign_bits(bits={}, widths=('W4A4', 'W8A8'), groups=(16, 32, -1), rounding='nearest', tokens=64{})"


def marks_of(gm):
    return {layer.path: layer.mark for layer in layers(gm) if layer.site("weight").encoding}


@pytest.mark.parametrize("bits", [4.75, 5.6, 7.0])
@pytest.mark.parametrize("fused", [True, False])
def test_widths_of_inputs_are_chosen_with_those_of_weights(bits, fused):
    gm, _ = assigned(PAIRS.format(bits, f", fused={fused}"), before=BOTH)
    used, weights = counted(gm)
    assert 0.99 * bits <= used / weights <= bits
    marks = marks_of(gm)
    assert {(mark.weight.bits, mark.input.bits) for mark in marks.values()} == {(4, 4), (8, 8)}
    for index in range(2) if fused else ():
        assert len({marks[f"model.layers.{index}.self_attn.{name}_proj"].input for name in "qkv"}) == 1
    assert marks == marks_of(assigned(PAIRS.format(bits, f", fused={fused}"), before=BOTH)[0])


def test_more_budget_costs_less_and_buys_wider_inputs():
    found = []
    for bits in (4.7, 6.0, 8.6):
        gm, ctx = assigned(PAIRS.format(bits, ""), before=BOTH)
        found.append((sum(mark.input.bits for mark in marks_of(gm).values()), -sum(row["nats a token"] for row in ctx.tables["widths"])))
    assert found == sorted(found) and len(set(found)) == 3


def test_of_inputs_that_take_no_budget_the_widest_is_taken():
    gm, _ = assigned("assign_bits(bits=5.0, widths=('W4A4', 'W4A16', 'W4A8'), rounding='nearest', tokens=64)")
    assert {str(mark) for mark in marks_of(gm).values()} == {"u4[1,32]"}
    gm, _ = assigned("assign_bits(bits=5.0, widths=('W4A4', 'W4A8'), rounding='nearest', tokens=64)")
    assert {str(mark) for mark in marks_of(gm).values()} == {"u4[1,32]/i8[1,-1]dynamic"}


def test_numbers_leave_inputs_as_they_are_annotated():
    gm, ctx = assigned("assign_bits(bits=4.0, widths=(2, 4), rounding='nearest', tokens=64)", before=BOTH)
    assert {str(mark.input) for mark in marks_of(gm).values()} == {"i4[1,-1]dynamic"}
    alone = assigned("assign_bits(bits=4.0, widths=(2, 4), rounding='nearest', tokens=64)")[1]
    nats = [sum(row["nats a token"] for row in found.tables["widths"]) for found in (ctx, alone)]
    assert nats[0] > nats[1]  # what rounding the inputs costs is predicted too


def test_prediction_follows_measurement_with_rounded_inputs():
    predicted, measured = [], []
    for widths in (("W8A8",), ("W8A4",), ("W4A8",), ("W4A4",), ("W3A3",)):
        text = f"assign_bits(bits=9.5, widths={widths}, rounding='nearest', tokens=96, measure=96)"
        (row,) = assigned(text)[1].tables["choices"]
        predicted.append(row["predicted, nats a token"])
        measured.append(row["measured, nats a token"])
    assert [sorted(measured).index(value) for value in measured] == [sorted(predicted).index(value) for value in predicted]
    assert all(0.4 < a / b < 2.5 for a, b in list(zip(predicted, measured, strict=True))[:4])


def test_costs_of_pairs_are_kept(tmp_path):
    file = f", file={str(tmp_path / 'costs.json')!r}"
    first, _ = assigned(PAIRS.format(5.6, file), before=BOTH)
    again = load("llama").graph()
    run(again, f"{BOTH}, {PAIRS.format(5.6, file)}")  # without calibration data
    assert marks_of(again) == marks_of(first)
    with pytest.raises(DataError, match=r"the costs lack .* as u4.*/i8"):
        run(load("llama").graph(), f"{BOTH}, {PAIRS.replace('W4A4', 'W4A8').format(5.6, file)}")


def test_the_report_shows_both_widths():
    _, ctx = assigned(PAIRS.format(5.6, ""), before=BOTH)
    shown = {row["encoding"] for row in ctx.tables["widths"]}
    assert all("/i" in text for text in shown)
    (table,) = picture.widths(ctx.tables["widths"])
    cells = {str(cell).strip() for column in table.columns for cell in column.cells}
    assert cells & {"8/8", "8·16/8", "8·32/8"} and cells & {"4/4", "4·16/4", "4·32/4"}


def test_inputs_that_are_rounded_already_are_refused():
    with pytest.raises(OptionError, match="rounded already") as error:
        assigned(PAIRS.format(5.6, ""), before=f"{BOTH}, quantize(weights=False)")
    assert "before quantize" in error.value.remedy


def test_it_needs_annotations_and_data():
    with pytest.raises(OptionError, match="annotate"):
        run(load("llama").graph(), "canonicalize, assign_bits(bits=3.0)", CALIBRATION)
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, assign_bits(bits=3.0)")
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, assign_bits(bits=3.0, file={__file__!r}, measure=64)")
