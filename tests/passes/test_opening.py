import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import passes
from ir import store
from ir.capture import capture
from ir.errors import DataError
from ir.store import Store, store_of
from ir.text import graph_text
from passes.commands.loading import load_model
from passes.data import stream
from tests.families import build, distinct_first

TINY = Path("fixtures/tiny-llama")


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """The checkpoint of a family."""
    model = build(name, dtype)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def check_equal(folder: Path, dtype: str) -> None:
    """What is mapped is what the library loads: tensors, names, buffers, configuration and graph."""
    mapped = load_model(folder, dtype)
    own = type(mapped).from_pretrained(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype)).eval()
    assert mapped.config.to_dict() == own.config.to_dict()
    assert mapped.name_or_path == own.name_or_path
    mine, theirs = mapped.state_dict(), own.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert all(torch.equal(a, b) for a, b in zip(mapped.buffers(), own.buffers(), strict=True))
    assert len(list(mapped.parameters())) == len(list(own.parameters()))  # tied ones once
    if own.can_generate():
        assert mapped.generation_config.to_dict() == own.generation_config.to_dict()
    assert graph_text(capture(mapped)) == graph_text(capture(own))


@pytest.mark.parametrize("name", [*distinct_first(), "llama_tied"])
def test_mapped_models_are_those_of_the_library(name, tmp_path):
    check_equal(saved(name, tmp_path), "float32")


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_shards_and_other_dtypes(tmp_path, dtype):
    folder = saved("llama_tied", tmp_path, torch.bfloat16, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_equal(folder, dtype)


@pytest.mark.parametrize("stated", [True, False])
def test_the_own_dtype_is_stated_or_found(tmp_path, stated):
    folder = saved("llama", tmp_path, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    if not stated:
        del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder, "auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_are_on_disk(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(store, "SMALL", 64)
    model = load_model(saved("llama", tmp_path, torch.bfloat16), dtype)
    own = store_of(model)
    assert own is not None
    assert all(own.holds(parameter) for parameter in model.parameters())


def test_weights_that_transformers_joins_are_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SMALL", 64)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_experts=4,
        num_experts_per_tok=2, architectures=["OlmoeForCausalLM"],
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path)
    theirs = transformers.OlmoeForCausalLM.from_pretrained(tmp_path).state_dict()
    model = load_model(tmp_path)
    own = store_of(model)
    assert own is not None
    assert all(own.holds(parameter) for parameter in model.parameters())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_the_library_loads_checkpoints_of_other_kinds(tmp_path):
    model = build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_model(tmp_path)
    assert store_of(loaded) is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["short", "missing", "unnamed"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    folder = saved("llama", tmp_path, shard="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "short":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "missing":
        shard.unlink()
    else:
        index = folder / "model.safetensors.index.json"
        weights = {key: name for key, name in json.loads(index.read_text())["weight_map"].items() if name != shard.name}
        index.write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(DataError):
        load_model(folder)


def compiled(model, pipeline, folder):
    windows = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(0))
    passes.compile(model, pipeline, windows.split(4)).save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in {"graph.json", "weights.safetensors", "recipe.yaml"}}


@pytest.mark.parametrize(
    "pipeline",
    ["w4a16(head=True, embeddings=True)", "w4a4(transform='rotate', rounding='gptq')", pytest.param("w4a4", marks=pytest.mark.thorough)],
)
def test_a_compile_on_disk_gives_the_same_bits(tmp_path, monkeypatch, pipeline):
    """Every tensor on disk, pages released at every step, streams of calibration on disk too, against everything in memory."""
    for module, name, value in ((store, "SMALL", 64), (store, "HANDED_OUT", 1 << 19), (stream, "HANDED_OUT", 1)):
        monkeypatch.setattr(module, name, value)
    source = shutil.copytree(TINY, tmp_path / "source")
    model = load_model(source)
    assert store_of(model) is not None
    inside = copy.deepcopy(model)
    delattr(inside, store.NAME)
    assert store_of(inside) is None
    assert not any(store_of(model).holds(parameter) for parameter in inside.parameters())
    in_memory = compiled(inside, pipeline, tmp_path / "memory")
    released = []
    release = Store.release
    monkeypatch.setattr(Store, "release", lambda self: (released.append(1), release(self)))
    assert compiled(model, pipeline, tmp_path / "disk") == in_memory
    assert len(released) > 20
