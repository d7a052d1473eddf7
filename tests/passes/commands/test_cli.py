"""The commands, in one process: what they print, what they write, how they fail."""

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import passes
from passes import registry
from passes.commands.cli import app
from passes.commands.loading import load_model, load_tokenizer, model_class
from passes.measure import greedy

SMALL = ["--samples", "8", "--window", "32", "--windows", "4"]

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Commands own their process and may silence others; tests share one."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        yield
    logging.getLogger("torch.onnx").setLevel(level)


@pytest.fixture
def run() -> Run:
    """Run a command; it must not end in an exception that is not its exit."""

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return invoke


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Path:
    return checkpoint / "tiny-llama"


@pytest.fixture(scope="session")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that `fxpress compile` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("cli") / "out"
    texts = ["--calibration", str(checkpoint / "calibration.txt"), "--text", str(checkpoint / "test.txt")]
    arguments = [
        "compile",
        str(checkpoint / "tiny-llama"),
        "--pipeline",
        "w4a16",
        *texts,
        "--backend",
        "reference",
        "--out",
        str(out),
        *SMALL,
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def refused(result: Result, *words: str, code: int = 1) -> None:
    """It failed with one message on standard error, without a traceback."""
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert not result.stdout
    message = re.sub(r"[\s│]+", " ", result.stderr)  # bad usage is shown in a box
    for word in words:
        assert word in message


def test_compile_writes_a_folder_and_a_page(compiled: tuple[Path, str]) -> None:
    out, page = compiled
    assert {"fxpress.json", "recipe.yaml", "report.json", "report.html", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    for words in ("round_weights", "effective bits", "embeddings are left out by default", "test.txt, before", "on disk"):
        assert words in page
    measures = json.loads((out / "report.json").read_text())["measures"]
    assert measures["test.txt, after"]["perplexity"] == pytest.approx(measures["test.txt, before"]["perplexity"], rel=0.2)
    assert 0 <= measures["test.txt, after"]["KL from original"] < 1


def test_a_recipe_replays_the_same_model(run: Run, compiled: tuple[Path, str], model: Path, checkpoint: Path, tmp_path: Path) -> None:
    recipe, text = compiled[0] / "recipe.yaml", checkpoint / "calibration.txt"
    result = run("compile", model, "--recipe", recipe, "--calibration", text, "--out", tmp_path / "again", *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again/weights.safetensors").read_bytes() == (compiled[0] / "weights.safetensors").read_bytes()


def test_compile_to_onnx_and_generate_what_the_oracle_says(run: Run, model: Path, tmp_path: Path) -> None:
    for backend in ("reference", "onnx"):
        result = run("compile", model, "--pipeline", "w8a16", "--backend", backend, "--out", tmp_path / backend)
        assert result.exit_code == 0, result.output
    prompts = ["--prompt", "The house", "--prompt", "He said that all", "--tokens", 16]
    onnx, oracle = (run("generate", tmp_path / backend, *prompts) for backend in ("onnx", "reference"))
    assert onnx.exit_code == oracle.exit_code == 0
    assert onnx.stdout == oracle.stdout


def test_generate_continues_a_prompt(run: Run, compiled: tuple[Path, str]) -> None:
    result = run("generate", compiled[0], "--prompt", "The house was", "--tokens", 12)
    tokenizer = load_tokenizer(compiled[0])
    ids = torch.tensor([tokenizer("The house was")["input_ids"]])
    new = [int(token) for token in greedy(passes.load(compiled[0]), ids, 12)]
    ended = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    assert result.stdout == "The house was" + tokenizer.decode(ended) + "\n"
    assert re.search(r"prefill: .* tokens/s; decode: .* tokens/s", result.stderr)


def test_generate_pads_shorter_prompts_on_the_left(run: Run, compiled: tuple[Path, str]) -> None:
    prompts = ("He said", "The old town was not all that new")
    alone = [run("generate", compiled[0], "--prompt", prompt, "--tokens", 8).stdout.rstrip("\n") for prompt in prompts]
    together = run("generate", compiled[0], "--prompt", prompts[0], "--prompt", prompts[1], "--tokens", 8).stdout
    assert together == "\n\n".join(alone) + "\n"


def test_generate_refuses(run: Run, compiled: tuple[Path, str], model: Path) -> None:
    refused(run("generate", model, "--prompt", "x"), "not a folder that fxpress saved")
    refused(run("generate", compiled[0], "--prompt", ""), "no tokens")


def test_eval_compares_with_the_original(run: Run, compiled: tuple[Path, str], model: Path, checkpoint: Path) -> None:
    text = ["--text", checkpoint / "test.txt", "--windows", 2, "--window", 32]
    result = run("eval", compiled[0], "--reference", model, *text)
    assert result.exit_code == 0
    assert "KL from original" in result.stdout
    assert "same top token" in result.stdout
    alone = run("eval", model, *text)
    assert alone.exit_code == 0
    assert "without --reference" in alone.stdout


def test_passes_lists_every_pass_and_preset(run: Run) -> None:
    for arguments in ((), ("--markdown",)):
        result = run("passes", *arguments)
        assert result.exit_code == 0
        for name in (*registry.passes(), *registry.presets()):
            assert name in result.stdout


def test_inspect_shows_groups_blocks_and_coverage(run: Run, model: Path) -> None:
    result = run("inspect", model, "--pipeline", "w4a16(group=32, ignore=['down_proj'])", "--graph")
    assert result.exit_code == 0, result.output
    for words in ("q_proj, k_proj, v_proj", "4 blocks", "weights as u4[1,32]", "ignored by the recipe", "aten.rms_norm"):
        assert words in result.stdout


def test_inspect_says_what_a_backend_cannot_run(run: Run, model: Path) -> None:
    result = run("inspect", model, "--pipeline", "w4a16(group=8)", "--backend", "onnx")
    assert result.exit_code == 0, result.output
    assert "weights as" not in result.stdout


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("w4a17", "did you mean"),
        ("w4a16(bits=3)", "its options are"),
        ("w4a16(", "malformed pipeline text"),
        ("__import__('os')", "options of __import__ are given by name"),
        ("annotate(scheme=open('x'))", "not a literal"),
    ],
)
def test_bad_pipelines_are_refused_before_the_model_is_loaded(run: Run, tmp_path: Path, pipeline: str, words: str) -> None:
    refused(run("compile", "no/such/model", "--pipeline", pipeline, "--out", tmp_path / "out"), words)


def test_bad_files_are_refused_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    common = ("compile", "no/such/model", "--pipeline", "w8a16", "--out")
    refused(run(*common, tmp_path), "the output folder exists", "--overwrite")
    for name, words in (("missing.txt", "No such file"), ("empty.txt", "is empty"), ("bytes.txt", "not UTF-8")):
        refused(run(*common, tmp_path / "out", "--calibration", tmp_path / name), words, name)
    refused(run(*common, tmp_path / "out", "--backend", "onxx"), "there is no backend")
    refused(run("compile", "no/such/model", "--recipe", tmp_path / "empty.txt", "--out", tmp_path / "out"), "not a recipe")


def test_compile_shows_what_was_predicted_beside_what_was_measured(run: Run, model: Path, checkpoint: Path, tmp_path: Path) -> None:
    pipeline = "canonicalize, annotate(scheme='W4A16', group=32), assign_bits(bits=4.0, rounding='nearest', tokens=64), round_weights"
    texts = ("--calibration", checkpoint / "calibration.txt", "--text", checkpoint / "test.txt")
    arguments = ("--pipeline", pipeline, *texts, "--backend", "reference", "--out", tmp_path / "out", *SMALL)
    assert "KL predicted" in run("compile", model, *arguments).stdout
    assert "KL predicted" in (tmp_path / "out/report.html").read_text()


def test_report_opens_the_page(run: Run, compiled: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    result = run("report", compiled[0])
    assert result.exit_code == 0 and opened == [(compiled[0] / "report.html").as_uri()]
    assert "there is no browser" in result.stderr
    shutil.copy(compiled[0] / "report.json", tmp_path)
    assert run("report", tmp_path, "--no-open").stdout.split() == [str(tmp_path / "report.html")]
    assert (tmp_path / "report.html").read_text() == (compiled[0] / "report.html").read_text()
    assert len(opened) == 1
    refused(run("report", tmp_path / "nothing"), "not a report")


def test_compare_writes_a_page_and_prints_a_table(run: Run, compiled: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(compiled[0], tmp_path / "other")
    result = run("compare", compiled[0], tmp_path / "other", "--out", tmp_path / "both.html", "--no-open")
    assert result.exit_code == 0, result.output
    assert all(words in result.stdout for words in ("effective bits", "perplexity, test.txt, after", "other", "both.html"))
    assert "<title>out and other</title>" in (tmp_path / "both.html").read_text()
    refused(run("compare", compiled[0], tmp_path), "not a report")


def test_bad_usage_exits_with_2(run: Run, tmp_path: Path) -> None:
    refused(run("compile", "model", "--out", tmp_path / "out"), "either --pipeline or --recipe", code=2)
    refused(run("compile", "model", "--pipeline", "w8a16"), "Missing option", code=2)
    refused(run("compile", "model", "--pipeline", "w8a16", "--out", tmp_path / "out", "--samples", 0), "--samples", code=2)
    refused(run("shrink"), "No such command", code=2)


def test_models_that_cannot_be_loaded(run: Run, compiled: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    arguments = ("--pipeline", "w8a16", "--out", tmp_path / "out")
    refused(run("compile", "no/such/model", *arguments), "there is no such folder")
    refused(run("compile", compiled[0], *arguments), "it holds no checkpoint")
    (tmp_path / "empty").mkdir()
    refused(run("compile", tmp_path / "empty", *arguments), "cannot load the model")
    refused(run("compile", model, *arguments, "--dtype", "int3"), "there is no dtype")


def test_missing_weights_are_not_made_up(run: Run, model: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 2
    loaded = transformers.LlamaForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    refused(run("compile", tmp_path / "model", "--pipeline", "w8a16", "--out", tmp_path / "out"), "9 weights are missing")


def test_a_failed_gate_fails_the_command(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("compile", model, "--pipeline", "w4a16(group=8, rounding='nearest')", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the onnx backend cannot run model.layers.0.self_attn.q_proj as annotated" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_class_is_the_one_that_the_configuration_names() -> None:
    bert = transformers.BertConfig(architectures=["BertForSequenceClassification"])
    assert model_class(bert) is transformers.BertForSequenceClassification
    assert model_class(transformers.BertConfig()) is transformers.AutoModelForMaskedLM
    assert model_class(transformers.GPT2Config()) is transformers.AutoModelForCausalLM
    assert model_class(transformers.ViTConfig()) is transformers.AutoModel


def test_code_that_comes_with_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(passes.FxpressError, match="cannot load the model"):
        load_model(str(folder))
    assert not marker.exists()


def test_help_does_not_import_torch() -> None:
    code = "import sys, passes.commands.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_m_passes_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "passes", "--help"], check=True, capture_output=True, text=True)
    assert "Usage: fxpress" in result.stdout


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_pickles_and_configurations_of_others_run_nothing(model: Path, tmp_path: Path, name: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model, folder)

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    if name == "config.json":
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "hidden_size": 2**40}))
    else:
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Evil()}, folder / name)
    with pytest.raises(passes.FxpressError):
        load_model(str(folder))
    assert not marker.exists()


def test_a_page_that_came_with_a_folder_is_not_opened(run: Run, compiled: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(compiled[0] / "report.json", tmp_path)
    (tmp_path / "report.html").write_text("<script>alert(1)</script>")
    assert run("report", tmp_path, "--no-open").exit_code == 0
    assert "<script" not in (tmp_path / "report.html").read_text()
