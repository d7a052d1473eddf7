from dataclasses import fields

import pytest
import torch
import yaml

import passes
from ir.capture import capture
from ir.errors import DataError, OptionError
from passes import registry
from passes.pipeline import Pipeline
from passes.recipe import LONGEST, Recipe, calibration_fingerprint, fingerprint, versions, weights_fingerprint
from tests.families import build, load
from tests.passes.samples import Mlp, run, vectors

RECIPE = Recipe(
    pipeline="untie, annotate(ignore=('a\\nb', 'ü'))", backend="onnx", seed=3, versions={"torch": "2.13"}, weights="0123", calibration="1e5"
)


def test_a_recipe_survives_yaml(tmp_path):
    RECIPE.write(tmp_path / "recipe.yaml")
    assert Recipe.read(tmp_path / "recipe.yaml") == RECIPE


TEXT = yaml.safe_dump(RECIPE.model_dump())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "a: [",
        "\x00",
        TEXT + "colour: red\n",
        TEXT.replace("seed: 3", "seed: many"),
        TEXT.replace("backend: onnx\n", ""),
        TEXT.replace("backend: onnx", "backend: !!python/object/apply:os.system ['touch {flag}']"),
        "!!python/object/apply:os.system ['touch {flag}']",
        "!!python/object/new:passes.recipe.Recipe {}",
    ],
)
def test_what_is_no_recipe_is_refused_and_nothing_runs(tmp_path, text):
    flag, file = tmp_path / "flag", tmp_path / "recipe.yaml"
    file.write_text(text.replace("{flag}", str(flag)))
    with pytest.raises(OptionError, match="not a recipe"):
        Recipe.read(file)
    assert not flag.exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(OptionError, match="not a recipe"):
        Recipe.read(tmp_path / "no.yaml")


def test_other_fingerprints_are_refused():
    RECIPE.check("0123", "1e5")
    with pytest.raises(DataError, match="other weights"):
        RECIPE.check("0124", "1e5")
    with pytest.raises(DataError, match="other calibration data"):
        RECIPE.check("0123", "none")


def test_a_fingerprint_tells_names_dtypes_shapes_and_bits_apart():
    x = torch.zeros(4)
    variants = [("a", x), ("b", x), ("a", x.half()), ("a", x.reshape(2, 2)), ("a", -x), ("a", x + 1), ("a", x[:0])]
    assert len({fingerprint([variant]) for variant in variants}) == len(variants)
    assert fingerprint([]) == "none"
    assert fingerprint([("a", x.bfloat16()), ("s", torch.tensor(1.0))]) == fingerprint([("a", x.bfloat16()), ("s", torch.tensor(1.0))])
    assert calibration_fingerprint([[x], [x]]) != calibration_fingerprint([[x, x]])


def test_a_weights_fingerprint_is_that_of_the_model():
    assert weights_fingerprint(capture(build("gpt2"))) == weights_fingerprint(load("gpt2").captured)
    gm = capture(Mlp(), args=(vectors(),))
    before = weights_fingerprint(gm)
    run(gm, "annotate, round_weights(method='nearest')")
    assert weights_fingerprint(gm) != before


def test_versions_name_what_results_depend_on():
    assert {"fxpress", "torch", "transformers"} <= set(versions())


def bomb(start, step, levels=9):
    """YAML whose aliases name nine of the level below each."""
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{level}: &a{level} {step.format(', '.join([f'*a{level - 1}'] * 9))}" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb("[x, x]", "[{}]") + "\n" + TEXT,
        bomb("{{x: 1}}", "{{<<: [{}]}}"),
        "&a [*a]",
        "[" * 10_000,
        "a: !!timestamp x",
        "a: !!int ''",
        "a: !!float x",
        "a: !!bool x",
        TEXT.replace("seed: 3", "seed: 2020-13-45"),
        TEXT.replace("seed: 3", "seed: " + "9" * 5000),
        TEXT + "#" * LONGEST,
    ],
)
def test_yaml_that_grows_or_is_not_what_it_says_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(OptionError, match="not a recipe"):
        Recipe.read(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/kept.safetensors", "link/kept.safetensors", "\0"])
@pytest.mark.parametrize("step", ["observe(file={!r})", "assign_bits(file={!r})", "fit_budget(latencies={!r}, latency=1.0)"])
def test_a_recipe_names_no_files_elsewhere(tmp_path, monkeypatch, name, step):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/tmp")
    recipe = RECIPE.model_copy(update={"pipeline": step.format(name), "backend": "reference"})
    with pytest.raises(OptionError, match="outside of the working folder"):
        passes.compile(Mlp(), recipe, args=(vectors(),))
    recipe.check_files(Pipeline.parse(step.format("kept.safetensors")))


def test_every_option_that_names_a_file_is_known_as_one():
    named = {
        (name, field.name) for name, kind in registry.passes().items() for field in fields(kind) if field.name in {"file", "latencies"}
    }
    assert named == {(name, option) for name, kind in registry.passes().items() for option in kind.files}
