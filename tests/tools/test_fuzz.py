"""What fuzzers find is a test of the file that was mended; here a bounded number of their cases runs."""

import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import FxpressError
from passes.recipe import Recipe
from tools.fuzz.targets import RECIPE, TARGETS, Target, cases, check

COUNTS = {"checkpoint": 25, "tokenizer": 25, "graph": 120, "packed": 60, "onnx": 120, "report": 60, "pipeline": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_cases_raise_nothing_but_errors_of_ours(name, tmp_path):
    target = TARGETS[name]
    folders = (tmp_path / str(index) for index in range(10_000))
    taken = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on names that it does not know
        for case in [*target.corpus(), *cases(target, COUNTS.get(name, 200), seed=1)]:
            folder = next(folders)
            folder.mkdir()
            taken.append(check(target, case, folder))
    assert all(taken[: len(target.corpus())])
    assert not all(taken)


def test_a_fault_is_found(tmp_path):
    def read(folder: Path) -> None:
        if b"a" not in (folder / "text").read_bytes():
            raise KeyError("a")

    target = Target(lambda: [{"text": b"a"}], read)
    with pytest.raises(KeyError):
        for index, case in enumerate(cases(target, 1000, seed=0)):
            (tmp_path / str(index)).mkdir()
            check(target, case, tmp_path / str(index))


LINES = st.lists(st.sampled_from([*RECIPE.splitlines(), "a: &a [*a]", "<<: *a", "seed: !!int x", "- b", "? [x]", "seed: .inf", "? {a: b}"]))
VALUES = st.text(alphabet="!&*[]{}:,-?|>%@`'\"#\n 019ax.=~", max_size=12)


@settings(max_examples=150, deadline=None)
@given(LINES, VALUES, st.integers(0, 8))
def test_any_yaml_is_a_recipe_or_refused(tmp_path_factory, lines, value, place):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    lines.insert(min(place, len(lines)), f"seed: {value}")
    path.write_text("\n".join(lines))
    try:
        recipe = Recipe.read(path)
    except FxpressError:
        return
    recipe.write(path)
    assert Recipe.read(path) == recipe
