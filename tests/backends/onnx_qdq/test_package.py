import json
from pathlib import Path

import onnx
import pytest
import torch

import passes
from ir.errors import DataError, FxpressError
from tools.fuzz.targets import write_onnx

LOCATION = "location"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_onnx(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, change):
    """The folder with another model, whose metadata `change` sees as data."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    stated = json.loads(model.metadata_props[0].value)
    change(model, stated)
    model.metadata_props[0].value = json.dumps(stated)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def test_a_folder_of_ours_runs(folder):
    x = torch.tensor([[-1.0, 2.0, 0.0, 1.0]])
    assert torch.equal(passes.load(folder)(x), x.relu())


def place(name):
    """Another place of the weights, in an initializer and in a constant of a node."""

    def initializer(model, stated):
        next(entry for entry in model.graph.initializer[0].external_data if entry.key == LOCATION).value = name

    def constant(model, stated):
        tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        entry = tensor.external_data.add()
        entry.key, entry.value = LOCATION, name
        model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=tensor))

    return [initializer, constant]


PLACES = [change for name in ("../secret", "/etc/passwd", "", "model.onnx", "*/_ORT_MEM_ADDR_/*") for change in place(name)]
SETTINGS = [
    lambda model, stated: stated["session"].update({"session.collect_node_memory_stats_to_file": str(Path.cwd() / "written.csv")}),
    lambda model, stated: stated["session"].update({"session.qdq_matmulnbits_accuracy_level": "9"}),
    lambda model, stated: stated["session"].update({"session.x64quantprecision": ["1"]}),
    lambda model, stated: stated.update(session=[]),
    lambda model, stated: stated.pop("report"),
    lambda model, stated: stated.pop("signature"),
    lambda model, stated: stated["signature"]["inputs"][0].update(name="y"),
    lambda model, stated: stated["signature"]["outputs"].append({**stated["signature"]["outputs"][0], "name": "z"}),
    lambda model, stated: model.graph.initializer[0].dims.__setitem__(0, 2**40),
]


@pytest.mark.parametrize("change", PLACES + SETTINGS)
def test_a_model_that_names_other_files_or_settings_is_refused(folder, change, monkeypatch):
    (folder.parent / "secret").write_bytes(b"\0" * 64)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(FxpressError):
        passes.load(changed(folder, change))
    assert not (folder.parent / "written.csv").exists()


def test_names_that_are_no_text_are_refused(folder):
    initializer, constant = place("elsewhere")[0], place("no text")[1]
    changed(folder, lambda model, stated: (initializer(model, stated), constant(model, stated)))
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"no text", b"\xff" * 7))
    with pytest.raises(DataError, match="weights lie in"):
        passes.load(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_links_to_files_elsewhere_are_refused(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(DataError, match="out of the folder"):
        passes.load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x0a"])
def test_what_is_no_model_is_refused(folder, content):
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(DataError):
        passes.load(folder)
