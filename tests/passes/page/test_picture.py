import io

import pytest
from rich.console import Console

from passes.page import picture


def text(parts, width=120, **options):
    page = io.StringIO()
    console = Console(width=width, file=page, **options)
    for part in parts:
        console.print(part)
    return page.getvalue()


def rows(layers, encodings):
    return [
        {"layer": f"net.blocks.{index}.{name}", "encoding": encoding, "weights": 10, "nats a token": 0.1}
        for index in range(layers)
        for name, encoding in encodings.items()
    ]


def test_equal_layers_take_one_line():
    lines = text(picture.widths(rows(32, {"up": "u2[1,64]", "down": "u3[1,-1]"}))).splitlines()
    assert len(lines) < 9
    (row,) = [line for line in lines if "0–31" in line]
    assert "2·64" in row and " 3 " in row
    assert "net.blocks.*" in "".join(lines)


def test_the_width_of_the_input_stands_after_a_slash():
    page = text(picture.widths(rows(1, {"up": "u4[1,64]/i8[1,-1]dynamic", "gate": "u4[1,64]", "down": "i8[1,-1]/i4[1,-1]dynamic"})))
    assert all(words in page for words in (" 4·64/8 ", " 4·64 ", " 8/4 ", "after a slash those of the input"))


def test_one_size_of_groups_is_not_repeated():
    assert "·" not in text(picture.widths(rows(2, {"up": "u2[1,64]", "down": "u3[1,64]"})))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_width_has_its_colour(bits):
    page = text(picture.widths(rows(1, {"up": f"i{bits}[1,-1]"})), force_terminal=True, color_system="truecolor")
    red, green, blue = bytes.fromhex(picture.COLOURS[bits - 1][1:])
    assert f"48;2;{red};{green};{blue}m {bits} " in page


def test_brightness_follows_width():
    def brightness(colour):
        red, green, blue = bytes.fromhex(colour[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert sorted(picture.COLOURS, key=brightness) == list(picture.COLOURS)


def test_only_the_greatest_contributions_are_shown_measured_before_predicted():
    sites = [{"site": f"s{i}", "encoding": "u2[1,-1]", "weights": 1, "predicted, x": float(i)} for i in range(20)]
    page = text(picture.contributions(sites))
    assert "s19" in page and "s14" in page and "s13" not in page and "6 of 20" in page
    for row in sites:
        row["measured, nats a token"] = 20.0 - row["predicted, x"]
    page = text(picture.contributions(sites))
    assert "s0" in page and "s19" not in page
    assert f"{20 / 210:.1%}" in page


def test_budgets_are_a_line_and_what_was_measured():
    curve = [{"bits": 2.0 + i, "nats a token": 10.0**-i, "measured": None, "chosen": False} for i in range(8)]
    curve[2] |= {"measured": 0.25, "chosen": True}
    lines = text(picture.budgets(curve)).splitlines()
    assert "█▇▆▅▄▃▂▁" in lines[0] and len(lines) == 2
    assert all(words in lines[1] for words in ("4.000 bits", "0.01 predicted", "0.25 measured", "chosen"))


def test_what_smoothing_took_is_one_line():
    rows = [{"layer": "a", "alpha": 0.5, "quantile": 0.98}, {"layer": "b", "alpha": 0.25, "quantile": 0.98}]
    assert text(picture.smoothing(rows)) == "smoothing of 2 groups of channels: alpha 0.25 to 0.5, quantile 0.98\n"
    assert picture.DRAWN["policies"]([{"alpha": 0.5}]) == []


def test_only_the_strongest_interactions_are_shown():
    page = text(picture.interactions([{"first": f"a{i}", "second": "b", "nats a token": -0.5} for i in range(9)]))
    assert "a5" in page and "a6" not in page and "-0.5" in page
