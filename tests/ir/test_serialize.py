import json

import pytest
import torch
from safetensors.torch import save_file

from ir import edit, numerics, serialize, store
from ir.encoding import Encoding
from ir.errors import DataError
from ir.rounding import SCALE_DTYPE
from ir.serialize import GRAPH_FILE, WEIGHTS_FILE, load_graph, save_graph
from ir.sites import layers
from ir.weights import set_codes
from tests.ir.graphs import traced


def quantized(gm, text):
    for layer in layers(gm):
        if layer.kind == "Linear":
            encoding, weight = Encoding.parse(text), edit.attribute(gm, layer.weight)
            qparams = numerics.choose_qparams(weight, encoding, SCALE_DTYPE)
            set_codes(gm, layer, encoding, numerics.quantize(weight, qparams, encoding), qparams)
    edit.clean(gm)
    return gm


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2", "bert"])
def test_a_loaded_graph_computes_the_same_bits(families, name, tmp_path):
    gm = families(name).graph()
    save_graph(gm, tmp_path)
    example = gm.meta["example"]
    with torch.no_grad():
        for mine, loaded in zip(gm(*example), load_graph(tmp_path)(*example), strict=True):
            assert torch.equal(mine, loaded)


@pytest.mark.parametrize("text", ["u4[1,16]", "i3[1,-1]", "i1[1,-1]", "i8[1,-1]"])
def test_codes_are_packed_and_come_back(families, text, tmp_path):
    gm = quantized(families("llama").graph(), text)
    save_graph(gm, tmp_path)
    example = gm.meta["example"]
    with torch.no_grad():
        assert torch.equal(gm(*example)[0], load_graph(tmp_path)(*example)[0])


def test_online_transforms_are_saved(tmp_path):
    gm = traced(lambda x: torch.ops.fxpress.hadamard(x, 12).relu(), torch.randn(2, 3, 24))
    save_graph(gm, tmp_path)
    x = torch.randn(4, 5, 24)
    assert torch.equal(gm(x)[0], load_graph(tmp_path)(x)[0])


def test_fewer_bits_take_fewer_bytes(families, tmp_path):
    sizes = []
    for text in ("i8[1,-1]", "i4[1,-1]", "i2[1,-1]"):
        folder = tmp_path / text
        folder.mkdir()
        save_graph(quantized(families("llama").graph(), text), folder)
        sizes.append((folder / WEIGHTS_FILE).stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_shared_weights_are_stored_once(families, tmp_path):
    gm = families("llama_tied").graph()
    save_graph(gm, tmp_path)
    stored = sum(p.nbytes for p in {p.data_ptr(): p for p in [*gm.parameters(), *gm.buffers()]}.values())
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < stored * 1.2


@pytest.mark.parametrize(
    "target",
    [
        "os:system",
        "builtins:eval",
        "torch:load",
        "operator:methodcaller.x",
        "prims.add.default",
        "aten.add",
        "aten.nothing.default",
        "posix:system",
    ],
)
def test_targets_outside_the_lists_are_refused(families, target, tmp_path):
    save_graph(families("gpt2").graph(), tmp_path)
    data = json.loads((tmp_path / GRAPH_FILE).read_text())
    call = next(node for node in data["nodes"] if node["op"] == "call_function")
    call["target"] = target
    (tmp_path / GRAPH_FILE).write_text(json.dumps(data))
    with pytest.raises(DataError):
        load_graph(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-40], lambda text: "[]", lambda text: text.replace('"node"', '"n"'), lambda text: ""]
)
def test_damaged_graphs_are_refused(families, damage, tmp_path):
    save_graph(families("gpt2").graph(), tmp_path)
    path = tmp_path / GRAPH_FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError):
        load_graph(tmp_path)


def test_truncated_weights_are_refused(families, tmp_path):
    save_graph(families("gpt2").graph(), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError):
        load_graph(tmp_path)


def damaged(families, folder, change):
    save_graph(quantized(families("gpt2").graph(), "i4[1,-1]"), folder)
    data = json.loads((folder / GRAPH_FILE).read_text())
    change(data)
    (folder / GRAPH_FILE).write_text(json.dumps(data))
    with pytest.raises(DataError):
        load_graph(folder)


def code(data):
    return next(iter(data["packed"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: code(data)[1].__setitem__(-1, 2**40),  # a stated shape alone takes no memory
        lambda data: code(data)[1].__setitem__(-1, -1),
        lambda data: code(data).__setitem__(0, "i1[1,-1]"),
        lambda data: code(data).__setitem__(0, "i4[1," + "9" * 5000 + "]"),
        lambda data: data["shared"].update(x="forward.__globals__"),
        lambda data: data["shared"].update(x=["y"]),
        lambda data: next(node for node in data["nodes"] if node["op"] == "get_attr").update(target="forward.__func__.__globals__"),
        lambda data: next(node for node in data["nodes"] if node["op"] == "placeholder").update(target="class"),
        lambda data: next(node for node in data["nodes"] if node["op"] == "placeholder").update(target="self"),
        lambda data: data["nodes"][-2].update(kwargs={"dict": {"class": 1}}),
        lambda data: data["nodes"][-1].update(args={"torch": "_inductor"}),  # which torch would import
        lambda data: data["nodes"][-1].update(args={"device": 1e300}),
        lambda data: data["nodes"][-1].update(args=True),
    ],
)
def test_what_reaches_further_or_does_not_fit_is_refused(families, tmp_path, change):
    damaged(families, tmp_path, change)


def test_names_of_tensors_reach_no_other_object(families, tmp_path):
    save_graph(families("gpt2").graph(), tmp_path)
    for name in ("graph.owning_module.x", "forward.x", "__class__.x", "_modules.x", "forward"):
        save_file({name: torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(DataError):
            load_graph(tmp_path)


def test_weights_of_another_folder_are_not_read(families, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_graph(families("gpt2").graph(), folder)
    (folder / WEIGHTS_FILE).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out of the folder"):
        load_graph(folder)


@pytest.mark.parametrize("rows", [1, 1 << 10])
def test_large_graphs_stay_on_disk_and_compute_the_same_bits(families, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(serialize, "AT_ONCE", rows)
    gm = quantized(families("llama_tied").graph(), "u3[1,16]")
    save_graph(gm, tmp_path)
    monkeypatch.setattr(serialize, "LARGE", 0)
    monkeypatch.setattr(store, "SMALL", 64)
    loaded = load_graph(tmp_path)
    own = loaded.meta[edit.STORE]
    large = [tensor for tensor in loaded.buffers() if tensor.nbytes >= 64]
    assert large
    assert all(own.holds(tensor) for tensor in large)
    example = gm.meta["example"]
    with torch.no_grad():
        assert torch.equal(gm(*example)[0], loaded(*example)[0])
