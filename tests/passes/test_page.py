"""Pages of reports: whole, escaped, without anything from elsewhere; what they show is what the report says."""

import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

import passes
from ir.errors import DataError, OptionError
from passes import page
from passes.page import charts
from passes.page.compare import figures, steps
from passes.page.content import breakable, duration
from passes.page.saved import Saved, read
from passes.page.svg import Axis, tag
from tests.families import load
from tests.passes.samples import CALIBRATION

PIPELINE = (
    "canonicalize, untie, fold_norm, annotate(scheme='W4A16', group=32, symmetric=False), smooth_channels(search=True, where=['mlp']), "
    "assign_bits(bits=3.3, groups=(16, -1), rounding='nearest', tokens=64, measure=40), round_weights(method='nearest'), "
    "quantize_cache(bits=7, widths=(4, 8), tokens=64)"
)
SECTIONS = ["summary", "pipeline", "errors", "widths", "cache", "policies", "reads", "predicted", "coverage", "parts", "tables", "notes"]
VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}
HOSTILE = "</td></svg><script>alert('1')</script>\"><img src=http://x.y/z onerror=alert(2)>&amp;"


class Reader(HTMLParser):
    """Refuses tags that do not match; keeps all elements and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack, self.tags, self.attributes, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


@pytest.fixture(scope="module")
def report():
    made = passes.compile(load("llama").captured, PIPELINE, CALIBRATION).report()
    made.measures |= {"book.txt, before": {"perplexity": 11.5}, "book.txt, after": {"perplexity": 12.5, "KL from original": 0.2}}
    return json.loads(json.dumps(made.to_json()))


@pytest.fixture(scope="module")
def plain():
    return json.loads(json.dumps(passes.compile(load("llama").captured, "w8a8", CALIBRATION).report().to_json()))


def folder(place: Path, report: object) -> Path:
    place.mkdir(exist_ok=True)
    (place / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return place


def written(place: Path, report: object) -> Reader:
    return Reader(page.write_report(folder(place, report)).read_text(encoding="utf-8"))


def test_a_whole_report_has_all_sections_and_nothing_from_elsewhere(report, tmp_path):
    found = written(tmp_path, report)
    assert found.ids == SECTIONS
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|\bon\w+=", text)
    assert {value for _, name, value in found.attributes if name in {"href", "src"}} == {f"#{name}" for name in SECTIONS}
    assert "prefers-color-scheme: dark" in text and ("meta", "content", "width=device-width, initial-scale=1") in found.attributes
    assert len(text) < 150_000
    assert page.write_report(tmp_path).read_text(encoding="utf-8") == text


def test_every_pass_stands_with_its_time_and_error(report, tmp_path):
    text = written(tmp_path, report).text
    for row in report["passes"]:
        assert row["pass"] in text
        assert f"{row['seconds']:.2f}" in text
        assert row["difference"] is None or f"{row['difference']:.2g}" in text


def test_every_rounded_layer_has_a_bar_and_a_width(report, tmp_path):
    found = written(tmp_path, report)
    for row in report["layers"]:
        said = f"{row['layer']}: {row['encoding']}, error of the weight {row['error']:.3g}" if row["encoding"] else ""
        assert said in found.text  # the title of its bar
    titles = [value for tag, name, value in found.attributes if (tag, name) == ("td", "title")]
    assert sum(title.partition(":")[0] in {row["layer"] for row in report["layers"]} for title in titles) == 14
    assert not any("embed_tokens" in title or "lm_head" in title for title in titles)


def test_what_was_measured_stands_beside_what_was_predicted(report, tmp_path):
    text = written(tmp_path, report).text
    assert all(words in text for words in ("measured on held-out tokens", "the result on texts", "greatest contributions, 8 of 8 sites"))
    assert f"{report['tables']['choices'][0]['measured, nats a token']:.4g}" in text
    assert "12.5" in text and "11.5" in text


def test_every_policy_that_was_tried_is_a_square(report, tmp_path):
    found = written(tmp_path, report)
    squares = [value for tag, name, value in found.attributes if (tag, name, value) == ("rect", "class", "heat")]
    assert len(squares) == len(report["tables"]["policies"]) > 40


def test_sections_without_data_are_left_out(plain, tmp_path):
    assert written(tmp_path, plain).ids == [name for name in SECTIONS if name not in {"cache", "policies", "predicted", "tables"}]
    older = {name: value for name, value in plain.items() if name not in {"layers", "reads", "parts"}}
    assert written(tmp_path, older).ids == ["summary", "pipeline", "coverage", "notes"]


def hostile(value):
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_what_comes_from_the_model_is_text(report, tmp_path):
    kept = {"encoding": "u4[1,-1]"}
    wrong = hostile(report)
    for rows in (wrong["layers"], wrong["tables"]["widths"], wrong["tables"]["cache"]):
        rows[:] = [{**row, **kept} for row in rows]
    wrong["coverage"]["left"] = {HOSTILE: 10}
    wrong["measures"] = {HOSTILE: {"KL from original": 0.1, HOSTILE: 0.1}}
    wrong["target"] = {HOSTILE: [HOSTILE]}
    wrong["passes"][0]["effect"] = "preserve"
    found = written(tmp_path / "a", wrong)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert HOSTILE in found.text
    second = Reader(
        page.write_comparison(tmp_path / "a", folder(tmp_path / HOSTILE[:9].replace("/", "-"), wrong), tmp_path / "c.html")[0].read_text()
    )
    assert not {"script", "img"} & set(second.tags) and HOSTILE in second.text


@pytest.mark.parametrize("wrong", ["", "[]", "no json", "{}", "[" * 100_000, '{"model": 1}'])
def test_what_is_no_report_is_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="not a report"):
        page.write_report(folder(tmp_path, wrong))
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report["tables"].update(policies=[{"alpha": 1}]),
        lambda report: report["tables"].update(budgets=[{}]),
        lambda report: report["tables"]["contributions"][0].update(site=1, **{"measured, nats a token": "x"}),
        lambda report: report["tables"].update(cache=[{"site": "a", "encoding": "i4["}]),
        lambda report: report["layers"][1].update(encoding="i99"),
        lambda report: report["layers"][1].update(error="much"),
    ],
)
def test_a_damaged_report_is_refused(report, tmp_path, damage):
    wrong = json.loads(json.dumps(report))
    damage(wrong)
    with pytest.raises(passes.FxpressError):
        page.write_report(folder(tmp_path, wrong))
    assert not (tmp_path / "report.html").exists()


def test_numbers_that_are_none_do_not_spoil_a_page(report, tmp_path):
    wrong = json.loads(json.dumps(report))
    wrong["difference"] = math.inf
    wrong["layers"][1]["error"] = math.nan
    wrong["reads"][0]["after"] = []
    wrong["tables"]["budgets"][0]["nats a token"] = math.nan
    written(tmp_path, wrong)
    assert not re.search(r'="-?(nan|inf)"', (tmp_path / "report.html").read_text())


def test_two_compiles_side_by_side(report, plain, tmp_path):
    first, second = folder(tmp_path / "small", report), folder(tmp_path / "plain", plain)
    path, tables = page.write_comparison(first, second, tmp_path / "both.html")
    found = Reader(path.read_text(encoding="utf-8"))
    assert found.ids == ["summary", "steps", "errors", "widths", "parts", "notes"]
    assert all(words in found.text for words in ("small", "plain", "only small", f"{report['coverage']['effective_bits']:.3f}"))
    bars = [value for tag, name, value in found.attributes if (tag, name) == ("rect", "class")]
    assert bars.count("a") >= 14 and bars.count("b") >= 14
    assert [table.title for table in tables] == ["compared", "passes that differ"]
    same, tables = page.write_comparison(first, first, path)
    assert "notes" not in Reader(same.read_text(encoding="utf-8")).ids and len(tables) == 1


def test_passes_of_one_name_stand_beside_each_other(report, plain):
    one, other = Saved.model_validate(report), Saved.model_validate(plain)
    pairs = [tuple(row.text.partition("(")[0] if row else None for row in pair) for pair in steps((one, other))]
    assert ("canonicalize", "canonicalize") in pairs and ("untie", None) in pairs and ("annotate", "annotate") in pairs
    assert [a for a, _ in pairs if a] == [row.text.partition("(")[0] for row in one.passes]
    assert ("perplexity, book.txt, after", "12.5", "") in figures((one, other))


def test_only_pages_of_ours_are_replaced(plain, tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    one = folder(tmp_path / "a", plain)
    for out in (tmp_path / "mine.html", tmp_path):
        with pytest.raises(OptionError, match="did not write it"):
            page.write_comparison(one, one, out)
    assert (tmp_path / "mine.html").read_text() == "mine"
    with pytest.raises(DataError, match="cannot write"):
        page.write_comparison(one, one, tmp_path / "no" / "such.html")


def test_a_saved_report_is_read_as_it_was_written(report, tmp_path):
    found = read(folder(tmp_path, report))
    assert [row.text for row in found.passes] == [row["pass"] for row in report["passes"]]
    assert [str(row.encoding or "") for row in found.layers] == [row["encoding"] for row in report["layers"]]


@pytest.mark.parametrize(
    ("values", "log"), [([0.001, 20.0], True), ([2.0, 2.1], True), ([0.0, 0.7], False), ([-3.0, 8.0], False), ([], True), ([5.0], False)]
)
def test_an_axis_covers_its_values(values, log):
    axis = Axis.over(values, 100.0, 0.0, log=log)
    places = [axis.at(value) for value in values]
    assert all(0 <= place <= 100 for place in places) and places == sorted(places, reverse=True)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9 and all(axis.low <= tick <= axis.high for tick in ticks)
    assert axis.at(axis.low) == 100 and axis.at(axis.high * 2 if axis.high > 0 else 0) == 0


def test_bars_are_as_long_as_their_values():
    text = str(
        charts.columns(
            "t", [charts.Column("a", [charts.Bar(0, 1, "x"), None], ""), charts.Column("b", [charts.Bar(0, 2, "x")], "")], [1, 2]
        )
    )
    first, second = (float(height) for height in re.findall(r'<rect class="x"[^>]*height="([\d.]+)"', text))
    assert second == pytest.approx(2 * first, rel=1e-3)


def test_elements_escape_what_is_in_them():
    assert tag("g", "<b>", tag("i"), class_='"', stroke_width=1.0, x=None) == Markup(
        '<g class="&#34;" stroke-width="1">&lt;b&gt;<i></i></g>'
    )
    assert breakable("f(<a_b>)") == Markup("f(<wbr>&lt;a_<wbr>b&gt;)")
    assert [duration(seconds) for seconds in (1.25, 61, 600, 7200)] == ["1.2 s", "61 s", "10.0 min", "2.0 h"]


def test_the_template_is_installed_with_the_package():
    root = Path(passes.__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["passes.page"]
    assert sorted(listed) == sorted(file.name for file in (root / "passes/page").iterdir() if file.suffix in {".html", ".css"})


def test_layers_that_would_make_a_grid_without_end_are_refused(report, tmp_path):
    wrong = json.loads(json.dumps(report))
    row = wrong["layers"][1]
    wrong["layers"] = [{**row, "layer": f"a.{index}.b{index}"} for index in range(1100)]
    with pytest.raises(DataError, match="grid"):
        page.write_report(folder(tmp_path, wrong))
