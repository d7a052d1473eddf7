import pytest
import torch
import transformers

import passes
from ir.errors import BackendError, FxpressError
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import Mlp, tokens, vectors

PLAIN = "multiple=4, criterion='magnitude', compensate=False"


@pytest.mark.parametrize(
    ("family", "pipeline", "numbers"),
    [
        ("llama", f"prune(share=0.4, {PLAIN})", {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", f"prune(share=0.4, {PLAIN})", {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama_tied", "untie", {}),
        ("gemma3", f"prune(share=0.5, what=['layers'], {PLAIN})", {"num_hidden_layers": 1}),
        ("llama", f"prune(share=0.5, what=['query_heads'], {PLAIN})", {"num_attention_heads": 2}),
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
    ("pipeline", "said"),
    [
        (f"prune(share=0.25, what=['mlp'], ignore=['re:.*layers.0.*'], {PLAIN})", "no configuration"),
        ("untie, fold_norm", r"it has no model\.(layers|norm)"),
    ],
)
def test_what_is_no_model_of_the_class_is_refused(pipeline, said):
    with pytest.raises(BackendError, match=said):
        passes.compile(load("llama").captured, f"canonicalize, {pipeline}", backend="hf")


def test_quantized_graphs_and_other_models_are_refused():
    with pytest.raises(FxpressError, match="floating point only"):
        passes.compile(load("llama").captured, "w8a16", backend="hf")
    x = vectors()
    with pytest.raises(BackendError, match="not of a model of transformers"):
        passes.compile(Mlp().eval().requires_grad_(False), "canonicalize", backend="hf", args=(x,))
