import json
import sys

import pytest
import torch
import transformers

import passes
from backends.hf import HuggingFace
from ir.errors import BackendError, DataError, OptionError
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import Mlp, compiled, tokens, vectors

PLAIN = "multiple=4, criterion='magnitude', compensate=False"


@pytest.mark.parametrize(
    ("family", "pipeline", "numbers"),
    [
        ("llama", f"prune(share=0.4, {PLAIN})", {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", f"prune(share=0.4, {PLAIN})", {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama_tied", "untie", {}),
        ("gemma3", f"prune(share=0.5, what=['layers'], {PLAIN})", {"num_hidden_layers": 1}),
        ("llama", f"prune(share=0.5, what=['query_heads'], {PLAIN})", {"num_attention_heads": 2}),
        ("gpt_neox", "untie, fold_norm, center_norm", {}),
    ],
)
def test_the_folder_loads_with_no_code_of_ours(tmp_path, family, pipeline, numbers):
    made = passes.compile(load(family).captured, f"canonicalize, {pipeline}", backend="hf")
    assert made.report().target["config"].items() >= numbers.items()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert {key: getattr(model.config, key) for key in numbers} == numbers
    past: tuple = (None, None)
    for ids in (tokens(2, 7), tokens(2, 1), tokens(2, 1, seed=3)):
        with torch.no_grad():
            first, second = made(input_ids=ids, past_key_values=past[0]), model(input_ids=ids, past_key_values=past[1])
        assert relative_error((second.logits,), (first.logits,)) < 1e-5
        past = first.past_key_values, second.past_key_values
    if family == "llama":
        assert relative_error((passes.load(tmp_path / "out")(input_ids=ids).logits,), (made(input_ids=ids).logits,)) < 1e-5


def test_generation_and_dtype_come_along(tmp_path):
    model = transformers.LlamaForCausalLM(load("llama").model.config).to(torch.bfloat16)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    folder = passes.compile(model, f"canonicalize, prune(share=0.4, {PLAIN})", backend="hf").save(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.temperature == 0.5


@pytest.mark.parametrize(
    ("family", "pipeline", "said"),
    [
        ("llama", f"prune(share=0.25, what=['mlp'], ignore=['re:.*layers.0.*'], {PLAIN})", "no configuration"),
        ("gpt_neox", "untie, fold_norm, center_norm, rotate_channels(where=['R1'])", "other logits"),
    ],
)
def test_what_is_no_model_of_the_class_is_refused(family, pipeline, said):
    with pytest.raises(BackendError, match=said):
        passes.compile(load(family).captured, f"canonicalize, {pipeline}", backend="hf")


def test_other_models_are_refused():
    x = vectors()
    with pytest.raises(BackendError, match="not of a model of transformers"):
        passes.compile(Mlp().eval().requires_grad_(False), "canonicalize", backend="hf", args=(x,))


MARKS = "annotate(scheme='W4A16', group=32, symmetric=False)"
MIXED = (
    f"canonicalize, untie, fold_norm, center_norm, rotate_channels(where=('R1', 'R2')), {MARKS}, "
    "assign_bits(bits=5, widths=(3, 4, 8), groups=(32, -1), rounding='nearest', loss='layer'), round_weights(method='nearest')"
)
QUANTIZED = {
    "w8a8": "int-quantized",
    "w8a8(dynamic=False)": "int-quantized",
    "w8a16": "pack-quantized",
    "w4a16(group=32, rounding='nearest')": "pack-quantized",
    MIXED: "pack-quantized",
    f"canonicalize, annotate(ignore=['down_proj']), {MARKS.replace(')', ', targets=[')}'down_proj']), quantize": "mixed-precision",
}


@pytest.mark.parametrize("pipeline", QUANTIZED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_quantized_folders_load_with_no_code_of_ours(tmp_path, family, pipeline):
    made = compiled(family, pipeline).lowered("hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert model.config.quantization_config.quantization_config.format == QUANTIZED[pipeline]
    past: tuple = (None, None)
    for ids in (tokens(2, 7), tokens(2, 1)):
        with torch.no_grad():
            first, second = made(input_ids=ids, past_key_values=past[0]), model(input_ids=ids, past_key_values=past[1])
        assert relative_error((second.logits,), (first.logits,)) < 1e-3
        past = first.past_key_values, second.past_key_values
    with torch.no_grad():
        assert relative_error((load(family).model(tokens(2, 7)).logits,), (made(tokens(2, 7)).logits,)) > 3e-3  # rounding shows
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme")]
    assert len(linears) == 14


def test_a_quantized_folder_is_read_by_us_without_that_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    made = compiled("gemma2", MIXED).lowered(HuggingFace(shard="20KB"))
    folder = made.save(tmp_path / "out")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"model.norm.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight_packed"} <= index.keys()
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = passes.load(folder)
    assert relative_error((loaded(tokens(2, 7)).logits,), (made(tokens(2, 7)).logits,)) < 1e-5
    (folder / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(DataError):
        passes.load(folder)


def test_what_is_pruned_and_quantized_in_halves(tmp_path):
    model = transformers.LlamaForCausalLM(load("llama").model.config).to(torch.bfloat16)
    pipeline = (
        f"canonicalize, prune(share=0.5, what=['layers'], {PLAIN}), annotate(scheme='W4A16', group=32), round_weights(method='nearest')"
    )
    folder = passes.compile(model, pipeline, backend="hf").save(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.config.num_hidden_layers, loaded.dtype) == (1, torch.bfloat16)
    with torch.no_grad():
        assert relative_error((loaded(tokens(2, 7)).logits,), (passes.load(folder)(tokens(2, 7)).logits,)) < 2e-2


def test_what_was_loaded_is_not_lowered(tmp_path):
    folder = compiled("llama", "w8a16").save(tmp_path / "out")
    with pytest.raises(OptionError, match="no graph to lower"):
        passes.load(folder).lowered("hf")
