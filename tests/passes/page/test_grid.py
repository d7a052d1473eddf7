import pytest

from passes.page.grid import Grid, grid, merged, place


@pytest.mark.parametrize(
    ("path", "row", "column"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3", "self_attn.q_proj"),
        ("lm_head", "", "lm_head"),
        ("encoder.proj", "encoder", "proj"),
        ("0", "", "0"),
        ("blocks.1.2", "blocks.1", "2"),
        ("layers.0.experts.7.down", "layers.0.experts.7", "down"),
        ("", "", ""),
        ("layers.1.up#2", "layers.1", "up#2"),
    ],
)
def test_places_follow_from_paths(path, row, column):
    assert place(path) == (row, column)


def test_layers_go_down_and_places_across():
    found = grid({"m.h.0.attn.q": 1, "m.h.0.mlp.up": 2, "m.h.1.attn.q": 3, "m.h.1.mlp.up": 4, "head": 5})
    assert found == Grid("m.h.", ["q", "up", "head"], [("0", [1, 2, None]), ("1", [3, 4, None]), ("", [None, None, 5])])


def test_places_with_the_same_last_name_are_told_apart():
    assert grid({"h.0.attn.proj": 1, "h.0.mlp.proj": 2, "h.0.mlp.up": 3}).columns == ["attn.proj", "mlp.proj", "up"]


def test_equal_neighbours_are_one_row():
    whole = grid({f"layers.{index}.up": 2 if index in {1, 2, 3} else 4 for index in range(6)})
    assert merged(whole).rows == [("0", [4]), ("1–3", [2]), ("4–5", [4])]
    assert merged(grid({"a.0.up": 1, "b.0.up": 1})).rows == [("a.0 – b.0", [1])]


def test_no_path_is_lost():
    paths = ["", "x", "x.y", "0", "1", "a.0", "a.0.b", "a.0.1.c", "a.1.1.c"]
    found = grid(dict(zip(paths, range(len(paths)), strict=True)))
    assert sorted(value for _, own in found.rows for value in own if value is not None) == list(range(len(paths)))
