import pytest
import torch
import yaml

from ir.capture import capture
from ir.errors import DataError, OptionError
from passes.recipe import Recipe, calibration_fingerprint, fingerprint, versions, weights_fingerprint
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
