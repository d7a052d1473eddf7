"""Saved folders in the real onnxruntime-genai: its greedy tokens are ours, and its tokenizer reads what we saved."""

import onnxruntime_genai
import pytest
import torch
import transformers

import passes
from passes.data.calibration import token_windows
from passes.measure import greedy
from tests.families import FAMILIES
from tools.check_genai import generate

TOKENS = 64
PROMPT = "The old house"
SCHEMES = {
    "embeddings and head": ("olmo2", "w4a16(rounding='nearest', group=32, embeddings=True, head=True)"),  # it has no name for the family
    "rotated, several widths": ("llama", "mixed(bits=4, widths=(3, 4, 8), groups=(32,), rounding='nearest', own_text=False)"),
}


@pytest.fixture(scope="module", params=SCHEMES)
def folder(request, checkpoint, tmp_path_factory):
    family, pipeline = SCHEMES[request.param]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "tiny-llama")
    windows = token_windows((checkpoint / "calibration.txt").read_text(), tokenizer, window=32, count=8)
    config = FAMILIES[family]()
    config.num_hidden_layers, config.vocab_size = 1, len(tokenizer)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    compiled = passes.compile(model, pipeline, [windows], "onnx", tokenizer=tokenizer)
    return compiled.save(tmp_path_factory.mktemp("genai") / "out")


def test_its_tokens_are_ours(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = onnxruntime_genai.Model(str(folder))
    theirs = onnxruntime_genai.Tokenizer(model)
    assert list(theirs.encode(PROMPT)) == ids[0].tolist()
    ours = [int(token) for token in greedy(passes.load(folder), ids, TOKENS)]
    assert list(generate(model, ids[0].tolist(), TOKENS)) == ours
    stream = theirs.create_stream()
    assert "".join(stream.decode(token) for token in ids[0].tolist()).strip() == PROMPT
