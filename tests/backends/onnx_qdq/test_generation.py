"""Greedy text from the exported folder, token for token that of the oracle, on the project's own trained model."""

import onnxruntime_genai
import pytest
import torch
import transformers
from typer.testing import CliRunner

import passes
from backends.reference import ReferenceExecutable
from passes.commands.cli import app
from passes.compiled import Compiled
from passes.measure import greedy
from tools.check_genai import generate

MODEL = "fixtures/tiny-llama"
PROMPTS = ["The film is", "In the summer of the year"]
SCHEMES = {"w8a8": "onnx"}  # a model of five layers takes half a minute: one scheme here, more in test_genai


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL, padding_side="left", pad_token="</s>")


@pytest.fixture(scope="module", params=SCHEMES)
def exported(request, tmp_path_factory):
    """The folder that was written, and the oracle."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    compiled = passes.compile(model, request.param, backend=SCHEMES[request.param])
    oracle = Compiled(ReferenceExecutable(compiled.graph), compiled.signature, "reference")
    return compiled.save(tmp_path_factory.mktemp("out") / request.param), oracle


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["batch 1", "batch 2"])
def test_sixty_four_tokens_equal_the_oracles(exported, tokenizer, prompts):
    folder, oracle = exported
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs = (batch["input_ids"], 64, batch["attention_mask"])
    ours = torch.stack(list(greedy(passes.load(folder), *inputs)), 1)
    assert ours.shape == (len(prompts), 64)
    assert torch.equal(ours, torch.stack(list(greedy(oracle, *inputs)), 1))


def test_onnxruntime_genai_generates_the_same_tokens(exported, tokenizer):
    folder, oracle = exported
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ours = [int(token) for token in greedy(oracle, ids, 64)]
    assert list(generate(onnxruntime_genai.Model(str(folder)), ids[0].tolist(), 64)) == ours


def test_the_command_prints_the_same_text(exported, tokenizer):
    folder, oracle = exported
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(torch.stack(list(greedy(oracle, ids, 64)), 1)[0])
    result = CliRunner().invoke(app, ["generate", str(folder), "--prompt", PROMPTS[0], "--tokens", "64"])
    assert result.exit_code == 0
    assert expected.strip() in result.stdout
