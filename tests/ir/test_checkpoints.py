import json

import pytest
import torch
from torch import nn

from ir.checkpoints import ROOM, bounded, check_checkpoint
from ir.errors import DataError


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_an_ordinary_folder_passes(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    (tmp_path / "link.txt").symlink_to("model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    write(tmp_path, **{"model.safetensors.index": index}, config={"num_hidden_layers": 2}, tokenizer_config={"vocab_file": None})
    check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors.index": {"weight_map": {"a": "../secret.safetensors"}}},
        {"model.safetensors.index": {"weight_map": {"a": "SECRET"}}},
        {"model.safetensors.index": {"weight_map": {"a": "nowhere.safetensors"}}},
        {"model.safetensors.index": {"weight_map": ["a"]}},
        {"model.safetensors.index": []},
        {"tokenizer_config": {"vocab_file": "SECRET"}},
        {"tokenizer_config": []},
        {"config": {"num_hidden_layers": 10**9}},
        {"config": {"n_layer": 1e300}},
        {"config": {"text_config": {"num_labels": 10**9}}},
        {"config": {"num_labels": float("nan")}},
        {"config": []},
    ],
)
def test_what_leads_elsewhere_or_is_absurd_is_refused(tmp_path, files):
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"")
    write(folder, **json.loads(json.dumps(files).replace("SECRET", str(secret))))
    with pytest.raises(DataError):
        check_checkpoint(folder)


@pytest.mark.parametrize("directory", [False, True])
def test_links_that_lead_out_are_refused(tmp_path, directory):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").symlink_to(tmp_path if directory else "/etc/hostname")
    with pytest.raises(DataError, match="out of the folder"):
        check_checkpoint(tmp_path / "model")


def test_a_model_has_no_more_than_its_folder_stores(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with bounded(tmp_path), torch.device("meta"):
        layer = nn.Linear(ROOM // 2, 1)
        for _ in range(3):
            layer.weight = nn.Parameter(torch.empty(ROOM, device="meta"))  # loading puts tensors where there were others
    with pytest.raises(DataError, match="greater than its weights"), bounded(tmp_path), torch.device("meta"):
        nn.Linear(ROOM, 2)
    with pytest.raises(DataError, match="greater than its weights"), bounded(tmp_path), torch.device("meta"):
        nn.Module().register_buffer("mask", torch.empty(ROOM + 401))
    nn.Linear(2, 2)  # and nothing is left behind


def test_a_configuration_does_not_make_modules_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ir.checkpoints.MODULES", 10)
    with pytest.raises(DataError, match="modules"), bounded(tmp_path):
        nn.ModuleList(nn.ReLU() for _ in range(10**6))
