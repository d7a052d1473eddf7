import json

import pytest
import torch
from safetensors.torch import load_file

import passes
from backends.triton_gpu import Triton, layout
from backends.triton_gpu.package import FILE, KERNELS, TritonExecutable
from ir import edit
from ir.errors import DataError, FxpressError
from ir.match import find
from ir.place import place
from tests.families import VOCABULARY


@pytest.fixture(scope="module")
def saved(families, tmp_path_factory):
    """A Llama with weights in both containers, and its folder."""
    pipeline = (
        "canonicalize, annotate(scheme='W3A8', targets=('down_proj',)), annotate(scheme='W4A16', group=32, symmetric=False, "
        "ignore=('down_proj',), embeddings=True), round_weights(method='nearest'), quantize"
    )
    compiled = passes.compile(families("llama").graph(), pipeline, backend="triton")
    return compiled, compiled.save(tmp_path_factory.mktemp("triton") / "out")


def test_a_saved_folder_loads_to_the_same_numbers(saved, tmp_path):
    compiled, folder = saved
    loaded = passes.load(folder)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    assert torch.equal(loaded(input_ids=ids).logits, compiled(input_ids=ids).logits)
    assert torch.equal(loaded.generate(ids, 5), compiled.generate(ids, 5))
    assert loaded.executable.report() == json.loads(json.dumps(compiled.executable.report()))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


def test_planes_are_stored_in_one_container_and_read_in_two(saved):
    compiled, folder = saved
    stored = {name: tensor.dtype for name, tensor in load_file(folder / "weights.safetensors").items() if "_plane_" in name}
    gm = compiled.executable.gm
    ours = {str(node.target): edit.attribute(gm, node).dtype for node in gm.graph.find_nodes(op="get_attr")}
    assert set(stored.values()) == {layout.CONTAINERS[16]}
    assert {ours[name] for name in stored if "down_proj" in name} == {layout.CONTAINERS[8]}
    assert {ours[name] for name in stored if "down_proj" not in name} == {layout.CONTAINERS[16]}
    assert len([name for name in stored if "down_proj" in name]) == 4  # two layers of 2 + 1 bits


def test_weights_in_another_layout_are_refused(saved, tmp_path):
    compiled, _ = saved
    compiled.save(tmp_path / "out")
    about = json.loads((tmp_path / "out" / FILE).read_text())
    (tmp_path / "out" / FILE).write_text(json.dumps(about | {"layout": layout.VERSION + 1}))
    with pytest.raises(DataError, match=r"version 2 of the layout(.|\n)*compile the model again"):
        passes.load(tmp_path / "out")


@pytest.mark.parametrize("change", [{"columns": {}}, {"signature": None}, {"facts": 3}])
def test_damaged_folders_are_refused(saved, tmp_path, change):
    compiled, _ = saved
    compiled.save(tmp_path / "out")
    about = json.loads((tmp_path / "out" / FILE).read_text())
    (tmp_path / "out" / FILE).write_text(json.dumps(about | change))
    with pytest.raises(DataError):
        Triton().load(tmp_path / "out")
    (tmp_path / "out" / FILE).unlink()
    with pytest.raises(DataError, match="not a folder of the triton backend"):
        Triton().load(tmp_path / "out")


def test_it_moves_with_what_the_graph_makes_by_itself(saved):
    """The device `meta` has no kernels and no numbers, but it refuses operands that are elsewhere, as GPUs do."""
    compiled, _ = saved
    gm = edit.copied(compiled.executable.gm)
    executable = TritonExecutable(gm, compiled.signature, {})
    inputs = [x.to("meta") for x in compiled.graph.meta["example"]]
    with pytest.raises(DataError, match=r"compiled\.to"):
        executable(*inputs)
    place(gm, torch.device("meta"))
    assert executable.device == torch.device("meta") and executable.report()["runs"] == KERNELS.format("meta")
    assert all(y.device == executable.device for y in executable(*inputs))
    assert compiled.device == torch.device("cpu")


def test_files_are_for_the_cpu_wherever_the_model_is(saved, tmp_path):
    compiled, _ = saved
    gm = edit.copied(compiled.executable.gm)
    for node in find(gm, torch.ops.aten.arange.default):
        node.kwargs = {**node.kwargs, "device": torch.device("meta")}
    TritonExecutable(gm, compiled.signature, {}).save(tmp_path)
    inputs = compiled.graph.meta["example"]
    assert torch.equal(TritonExecutable.load(tmp_path)(*inputs)[0], compiled.executable(*inputs)[0])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_the_fused_graph_compiles_without_a_break(saved, compiler):
    compiled, _ = saved
    gm = compiled.executable.gm
    inputs = compiled.graph.meta["example"]
    with torch.no_grad():
        made = torch.compile(gm, fullgraph=True, backend=compiler)(*inputs)
        for ours, oracle in zip(made, gm(*inputs), strict=True):
            torch.testing.assert_close(ours, oracle)


def test_what_has_one_device_says_so(families):
    compiled = passes.compile(families("llama").graph(), "w8a16")
    assert compiled.to("cpu") is compiled
    with pytest.raises(FxpressError, match="cannot move to nowhere"):
        compiled.to("nowhere")
    compiled.executable = object()
    with pytest.raises(FxpressError, match="no choice of devices"):
        compiled.to("cpu")
