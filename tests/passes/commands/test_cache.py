import torch
from typer.testing import CliRunner

from passes.commands.cli import app
from passes.memo.folder import Memo

KEY = "0" * 64


def run(*arguments):
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_results_are_listed_with_what_they_are_of_and_cleared(tmp_path):
    Memo(tmp_path).put(KEY, {"x": torch.zeros(1000)}, "round_weights: codes of model.layers.0", "LlamaForCausalLM, w4a16")
    listed = run("--cache", tmp_path)
    assert "codes of model.layers.0" in listed and "LlamaForCausalLM, w4a16" in listed and "1 results" in listed
    assert "MB removed" in run("--cache", tmp_path, "--clear")
    assert not list(tmp_path.iterdir()) and "0 results" in run("--cache", tmp_path)


def test_the_default_is_the_folder_of_the_user(cache):
    assert not cache.exists()
    Memo().put(KEY, {"x": torch.zeros(10)}, "one")
    assert "one" in run() and cache.exists()


def test_a_compile_uses_it_unless_told_otherwise(cache, checkpoint, tmp_path):
    def compiled(*options):
        command = ["compile", checkpoint / "tiny-llama", "--pipeline", "w4a16", "--calibration", checkpoint / "calibration.txt"]
        command += ["--samples", 4, "--window", 64, "--backend", "reference", "--out", tmp_path / "out", "--overwrite", *options]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        return result.output

    compiled("--no-cache")
    assert not cache.exists()
    assert "from the cache" not in compiled() and cache.exists()
    assert "4 of 4 results came from the cache" in compiled()
    compiled("--cache", tmp_path / "own", "--cache-size", 0)
    assert not list((tmp_path / "own").glob("*"))
