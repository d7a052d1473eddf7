import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import passes
from backends.hf import HuggingFace
from backends.hf.checkpoint import lower
from ir import edit
from ir.errors import BackendError, DataError, OptionError
from ir.sites import layers
from passes.probe import relative_error
from tests.families import VOCABULARY, load
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
    made = passes.compile(model, f"canonicalize, prune(share=0.4, {PLAIN})", backend="hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.temperature == 0.5
    rounded = passes.compile(made.graph, "annotate(scheme='W4A16', group=32), round_weights(method='nearest')", backend="hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(rounded.save(tmp_path / "rounded"))
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative_error((loaded(tokens(2, 7)).logits,), (rounded(tokens(2, 7)).logits,)) < 2e-2


@pytest.mark.parametrize(
    ("family", "pipeline", "said"),
    [
        ("llama", f"prune(share=0.25, what=['mlp'], ignore=['re:.*layers.0.*'], {PLAIN})", "no configuration"),
        ("gpt2", "untie, fold_norm", r"it has no transformer\."),
    ],
)
def test_what_is_no_model_of_the_class_is_refused(family, pipeline, said):
    with pytest.raises(BackendError, match=said):
        passes.compile(load(family).captured, f"canonicalize, {pipeline}", backend="hf")


def test_a_bias_that_the_class_has_no_place_for_is_named():
    gm = load("llama").graph()
    head = layers(gm)[-1].node
    head.args = (*head.args[:2], edit.add_attribute(gm, "shift", torch.ones(VOCABULARY), before=head))
    gm.recompile()
    with pytest.raises(BackendError, match=r"other logits .*the class has no lm_head\.bias"):
        lower(gm, [])


def test_other_models_are_refused():
    x = vectors()
    with pytest.raises(BackendError, match="not of a model of transformers"):
        passes.compile(Mlp().eval().requires_grad_(False), "canonicalize", backend="hf", args=(x,))


WIDTHS = "annotate(scheme='W4A16', group=32, symmetric=False), annotate(scheme='W8A16', targets=['down_proj'])"
MIXED = (
    f"canonicalize, untie, fold_norm, center_norm, rotate_channels(where=('R1', 'R2')), {WIDTHS}, "
    "annotate(scheme='W3A16', symmetric=False, targets=['gate_proj', 'up_proj']), round_weights(method='nearest')"
)
QUANTIZED = {
    "w8a8": "int-quantized",
    "w8a16": "pack-quantized",
    "w4a16(group=32, rounding='nearest')": "pack-quantized",
    MIXED: "pack-quantized",
}
FORMATS = {
    "w8a8(dynamic=False)": "int-quantized",
    "canonicalize, annotate, annotate(scheme='W4A16', group=32, symmetric=False, targets=['o_proj']), quantize": "mixed-precision",
}
CASES = [
    *((family, *case) for family in ("llama", "qwen2", "gemma2") for case in QUANTIZED.items()),
    *(("llama", *case) for case in FORMATS.items()),
]


@pytest.mark.parametrize(("family", "pipeline", "stated"), CASES)
def test_quantized_folders_load_with_no_code_of_ours(tmp_path, family, pipeline, stated):
    made = compiled(family, pipeline).lowered("hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert model.config.quantization_config.quantization_config.format == stated
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
    (folder / index["model.norm.weight"]).unlink()
    with pytest.raises(DataError):
        passes.load(folder)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    folder = compiled("llama", "w8a16").lowered("hf").save(tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.norm\.weight is missing"):
        passes.load(folder)


def test_a_quantized_head_is_untied(tmp_path):
    made = compiled("llama_tied", "w8a16(head=True)").lowered("hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"))
    assert not model.config.tie_word_embeddings
    with torch.no_grad():
        assert relative_error((model(tokens(2, 7)).logits,), (made(tokens(2, 7)).logits,)) < 1e-3


def test_sizes_of_files_are_checked_at_once():
    with pytest.raises(OptionError, match="shard='big' is no size"):
        HuggingFace(shard="big")


def test_layers_that_are_left_are_counted_anew(tmp_path):
    pipeline = (
        f"canonicalize, prune(share=0.5, what=['layers'], {PLAIN}), annotate(scheme='W4A16', group=32), round_weights(method='nearest')"
    )
    made = passes.compile(load("llama").captured, pipeline, backend="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"))
    assert model.config.num_hidden_layers == 1
    with torch.no_grad():
        assert relative_error((model(tokens(2, 7)).logits,), (made(tokens(2, 7)).logits,)) < 1e-3


def test_what_was_loaded_is_not_lowered(tmp_path):
    folder = compiled("llama", "w8a16").save(tmp_path / "out")
    with pytest.raises(OptionError, match="no graph to lower"):
        passes.load(folder).lowered("hf")


@pytest.mark.parametrize(
    "change",
    [
        lambda config, index: config.update(architectures=["pipeline"]),
        lambda config, index: config.update(architectures=["AutoTokenizer"]),
        lambda config, index: config.update(num_hidden_layers=10**8),
        lambda config, index: config.update(vocab_size=2**40),
        lambda config, index: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=99),
        lambda config, index: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=2),
        lambda config, index: index["weight_map"].update({"lm_head.weight": "../secret.safetensors"}),
    ],
)
def test_folders_of_others_are_refused(quantized_folder, tmp_path, change):
    folder = tmp_path / "out"
    shutil.copytree(quantized_folder, folder)
    shutil.copyfile(next(folder.glob("*.safetensors")), tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {}}
    config = json.loads((folder / "config.json").read_text())
    change(config, index)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError):
        passes.load(folder)


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    """A packed checkpoint, to be copied and damaged."""
    return compiled("llama", "w4a16(group=32, rounding='nearest')").lowered("hf").save(tmp_path_factory.mktemp("packed") / "out")
