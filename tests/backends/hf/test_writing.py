import json

import pytest
import torch
from safetensors.torch import load_file

from backends.hf import writing
from backends.hf.checkpoint import lower
from ir.errors import BackendError
from tests.families import load
from tests.passes.samples import run


def checkpoint(family, pipeline, shard):
    gm = load(family).graph()
    run(gm, f"canonicalize, annotate({pipeline}), round_weights(method='nearest'), quantize")
    return lower(gm, [], shard)


def content(folder):
    """Files without tensors, and tensors by file."""
    texts = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return texts, {path.name: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_the_folder_is_the_one_that_transformers_writes(family, shard, tmp_path):
    made = checkpoint(family, "scheme='W4A16', group=32, symmetric=False", shard)
    (tmp_path / "ours").mkdir()
    made.save(tmp_path / "ours")
    packed = {f"{name}.{part}": tensor.make().contiguous() for name, linear in made.linears.items() for part, tensor in linear.tensors()}
    made.model.save_pretrained(tmp_path / "theirs", state_dict={**made.model.state_dict(), **packed}, max_shard_size=shard)
    (texts, files), (their_texts, their_files) = content(tmp_path / "ours"), content(tmp_path / "theirs")
    assert texts == their_texts
    assert (len(files) > 1) == (shard == "20KB") == ("model.safetensors.index.json" in texts)
    assert files.keys() == their_files.keys()
    for file, tensors in files.items():
        assert tensors.keys() == their_files[file].keys()
        assert all(torch.equal(tensor, their_files[file][name]) for name, tensor in tensors.items())


def test_a_class_that_stores_its_linears_otherwise_is_refused(monkeypatch):
    def halved(model, state):
        return {f"{name}.{index}": half for name, tensor in state.items() for index, half in enumerate(tensor.chunk(2))}

    monkeypatch.setattr(writing, "revert_weight_conversion", halved)
    with pytest.raises(BackendError, match="stores its linears otherwise"):
        checkpoint("llama", "scheme='W4A16', group=32", "5GB")
