import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import passes
from backends.hf.cache import rounded_cache
from backends.hf.shapes import empty
from ir.cache import cache_sites
from ir.cache_code import CacheCode, recode
from ir.encoding import Encoding
from ir.errors import CoverageError, DataError
from passes.probe import relative_error
from tests.families import load
from tests.passes.samples import CALIBRATION, compiled, run, tokens

FLOATS = "quantize_cache(dynamic=False, tensor=True, floats=True)"
STATIC = "quantize_cache(dynamic=False, symmetric=True)"
LAYERS = "prune(share=0.5, what=['layers'], multiple=4, criterion='magnitude', compensate=False)"


@pytest.mark.parametrize(
    ("family", "pipeline", "strategy"),
    [
        ("llama", f"w8a16, {FLOATS}", "tensor"),
        ("gemma2", "canonicalize, quantize_cache(bits=4, dynamic=False, symmetric=True)", "attn_head"),
        ("llama", f"canonicalize, {LAYERS}, quantize_cache(dynamic=False, symmetric=True, tensor=True)", "tensor"),
    ],
)
def test_transformers_rounds_keys_and_values_as_the_graph_does(tmp_path, family, pipeline, strategy):
    made = compiled(family, pipeline).lowered("hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert model.config.quantization_config.quantization_config.kv_cache_scheme.strategy == strategy
    models, past = (made, model, passes.load(tmp_path / "out")), [None] * 3
    for ids in (tokens(2, 7), tokens(2, 1), tokens(2, 3, seed=3)):
        with torch.no_grad():
            found = [one(input_ids=ids, past_key_values=cache) for one, cache in zip(models, past, strict=True)]
        assert max(relative_error((other.logits,), (found[0].logits,)) for other in found[1:]) < 1e-5
        past = [one.past_key_values for one in found]
    ours, _, ours_again = past
    assert all(torch.equal(a[part], b[part]) for a, b in zip(ours, ours_again, strict=True) for part in a)
    for module in model.modules():
        module.quantization_enabled = False
    with torch.no_grad():
        assert relative_error((model(tokens(2, 7)).logits,), (made(tokens(2, 7)).logits,)) > 3e-3  # rounding shows


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "chosen at run time"),
        ("dynamic=False", "zero points"),
        ("dynamic=False, symmetric=True, channels=True", "alike"),
        ("dynamic=False, symmetric=True, values=4", "alike"),
        ("dynamic=False, symmetric=True, keys=16", "alike"),
        ("bits=6.0, dynamic=False, symmetric=True, widths=(4, 8)", "widths of keys and values do not go together"),
    ],
)
def test_a_cache_that_cannot_be_stated_is_refused_before_any_work(options, said):
    with pytest.raises(CoverageError, match=said) as caught:
        passes.compile(load("llama").captured, f"w4a16(group=32), quantize_cache({options})", CALIBRATION, backend="hf")
    assert "after nothing" in caught.value.where
    assert "dynamic=False, symmetric=True" in str(caught.value)


def test_a_class_without_attention_that_loaders_know_is_refused():
    with pytest.raises(CoverageError, match=r"transformer\.h\.0\.attn .*does not take it for attention"):
        compiled("gpt2", f"canonicalize, {STATIC}").lowered("hf")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"0.key": "i8[-1]", "0.value": "i8[-1]"}, r"layers\.1\.self_attn .*not rounded, and others are"),
        ({"0.key": "i8[-1]", "0.value": "i8[-1]", "1.key": "i4[-1]", "1.value": "i4[-1]"}, r"layers\.1\.self_attn .*i4\[-1\] .*i8\[-1\]"),
        ({"0.key": "i8[-1]"}, "alike, or none"),
    ],
)
def test_all_layers_are_rounded_alike(texts, said):
    gm = load("llama").graph()
    run(gm, "canonicalize")
    recode(gm, [(site, CacheCode(Encoding.parse(texts[name]), torch.ones(1, 1, 1, 1))) for name, site in cache_sites(gm) if name in texts])
    with pytest.raises(CoverageError, match=said):
        rounded_cache(gm, empty(gm.meta["config"], gm.meta["architecture"]))


def test_damaged_folders_are_refused(tmp_path):
    folder = compiled("llama", f"w8a16, {FLOATS}").lowered("hf").save(tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    assert state["model.layers.1.self_attn.k_scale"].shape == (1,)
    save_file({name: tensor for name, tensor in state.items() if not name.endswith("v_scale")}, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"self_attn\.v_scale is missing"):
        passes.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= {"strategy": "group", "group_size": 16, "dynamic": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="not read here"):
        passes.load(folder)
