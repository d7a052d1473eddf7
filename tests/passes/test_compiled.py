import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import passes
from backends.reference import Reference
from ir.errors import DataError, FxpressError, OptionError
from passes.folders import MANIFEST
from passes.measure import greedy
from passes.recipe import Recipe
from tests.families import load
from tests.passes.samples import Mlp, compiled, tokens, vectors


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A saved tiny Llama."""
    return compiled("llama", "w4a16").save(tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def small(tmp_path):
    """A small saved module, to be damaged."""
    made = passes.compile(Mlp(), "w8a16", args=(vectors(),))
    return made, made.save(tmp_path / "out")


def generated(model, batch):
    ids = tokens(batch, 7)
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0  # padded on the left
    return torch.stack(list(greedy(model, ids, 8, mask)), 1)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_reloaded_model_answers_bit_for_bit(saved, batch):
    made, loaded = compiled("llama", "w4a16"), passes.load(saved)
    ids = tokens(batch, 9)
    a, b = made(input_ids=ids), loaded(input_ids=ids)
    assert type(a) is type(b)
    assert torch.equal(a.logits, b.logits)
    a, b = (model(ids[:, :1], past_key_values=out.past_key_values) for model, out in ((made, a), (loaded, b)))
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(generated(made, batch), generated(loaded, batch))


@pytest.mark.parametrize("pipeline", ["w8a8", "w8a8(dynamic=False)", "w3a16(head=True, embeddings=True)", "untie"])
def test_every_kind_of_graph_is_reloaded(tmp_path, pipeline):
    made = compiled("llama_tied", pipeline)
    loaded = passes.load(made.save(tmp_path / "out"))
    assert torch.equal(made(tokens(3, 5)).logits, loaded(tokens(3, 5)).logits)


@dataclass(frozen=True)
class Remarking(Reference):
    """A backend that says something."""

    said: str = "one"

    def lower(self, gm, probe, notes):
        notes.append(self.said)
        return super().lower(gm, probe, notes)


def test_every_lowering_has_its_own_notes():
    made = passes.compile(load("llama").captured, "canonicalize", backend=Remarking())
    other = made.lowered(Remarking("two"))
    (of_pass,) = made.report().notes[:-1]
    assert [list(found.report().notes) for found in (made, other, other.lowered("reference"))] == [
        [of_pass, "one"],
        [of_pass, "two"],
        [of_pass],
    ]


def test_the_folder_holds_recipe_and_report(saved):
    made = compiled("llama", "w4a16")
    assert Recipe.read(saved / "recipe.yaml") == made._recipe
    report = json.loads((saved / "report.json").read_text())
    assert report["pipeline"] == str(passes.Pipeline.parse("w4a16"))
    assert report["coverage"]["effective_bits"] == made.effective_bits
    with pytest.raises(OptionError, match=r"report\.json"):
        passes.load(saved).report()


def test_a_table_that_cannot_be_drawn_costs_the_page_alone(tmp_path):
    made = passes.compile(Mlp(), "w8a16", args=(vectors(),))
    made.report().tables["contributions"] = [{"predicted": "much"}]
    with pytest.warns(UserWarning, match="report.html was not written"):
        out = made.save(tmp_path / "out")
    assert passes.load(out) and not (out / "report.html").exists()


def test_tied_weights_are_stored_once(tmp_path):
    made = compiled("llama_tied", "untie")
    made.save(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    expected = {name for name, _ in load("llama_tied").model.named_parameters()}
    assert sum(tensor.numel() for name, tensor in stored.items() if tensor.shape == (128, 64)) == 128 * 64
    assert len([name for name in stored if name.endswith("weight")]) == len(expected)


def test_a_folder_that_exists_is_kept(small):
    made, folder = small
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(OptionError, match="the output folder exists"):
        made.save(folder)
    assert (folder / MANIFEST).read_bytes() == before
    (folder / "stale").touch()
    made.save(folder, overwrite=True)
    assert not (folder / "stale").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_only_what_fxpress_wrote_is_replaced(small, tmp_path):
    made, _ = small
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name in ("mine", "file"):
        with pytest.raises(OptionError):
            made.save(tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert made.save(tmp_path / "empty", overwrite=True) == tmp_path / "empty"


def test_the_working_folder_is_a_folder(small, tmp_path, monkeypatch):
    made, _ = small
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made.save(".", overwrite=True)
    assert (tmp_path / "here" / MANIFEST).is_file()


@pytest.mark.parametrize("error", [RuntimeError("midway"), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_leaves_nothing_under_the_name(small, monkeypatch, error, overwrite):
    made, folder = small
    target = folder if overwrite else folder.with_name("new")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def save(directory):
        (Path(directory) / "weights.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(made.executable, "save", save)
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        made.save(target, overwrite=overwrite)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interruption_of_the_exchange_brings_the_old_folder_back(small, monkeypatch):
    made, folder = small
    rename = Path.rename

    def interrupted(self, target):
        if "partial" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.save(folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert (folder / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (MANIFEST, ""),
        (MANIFEST, "[]"),
        (MANIFEST, "null"),
        (MANIFEST, "{}"),
        (MANIFEST, '{"format": 2}'),
        (MANIFEST, '{"format": 1, "backend": "reference", "signature": {"inputs": 3}}'),
        (MANIFEST, '{"format": 1, "backend": "nowhere", "signature": {"inputs": [], "outputs": [], "output_class": "", "positional": []}}'),
        (MANIFEST, "[" * 100_000),
        (MANIFEST, b"\xff\xfe"),
        ("graph.json", ""),
        ("graph.json", "[]"),
        ("graph.json", '{"nodes": [], "packed": {}, "shared": {}}'),
        ("graph.json", '{"nodes": [{}], "packed": {}, "shared": {"a": "b"}}'),
        ("graph.json", "[" * 100_000),
        ("weights.safetensors", "x"),
        ("weights.safetensors", None),
        ("graph.json", None),
        (MANIFEST, None),
    ],
)
def test_a_damaged_folder_is_refused(small, file, content):
    _, folder = small
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FxpressError):
        passes.load(folder)


def test_a_missing_tensor_is_found_when_loading(small):
    _, folder = small
    tensors = load_file(folder / "weights.safetensors")
    tensors.pop("up.weight_codes")
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(DataError):
        passes.load(folder)


TOUCH = "__import__('pathlib').Path('{flag}').touch()"
HOSTILE = {
    "default of an input": lambda nodes, code: nodes["x"].update(target=f"x={code}"),
    "keyword": lambda nodes, code: nodes["linear"].update(kwargs={"dict": {f"y={code}, z": 1}}),
    "attribute": lambda nodes, code: nodes["up_bias"].update(target=f'x", 0) or {code.replace(".", chr(0x2024))} or getattr(self, "y'),
    "builtin": lambda nodes, code: nodes["linear"].update(target="builtins:eval"),
    "getter": lambda nodes, code: nodes["linear"].update(target="_operator:attrgetter"),
    "module": lambda nodes, code: nodes["linear"].update(target="torch:load"),
    "namespace": lambda nodes, code: nodes["linear"].update(target="prims.add.default"),
    "packet": lambda nodes, code: nodes["linear"].update(target="aten.__class__.__init__"),
    "reads a file": lambda nodes, code: nodes["linear"].update(target="aten.from_file.default"),
    "writes a file": lambda nodes, code: nodes["linear"].update(target="aten.save.default"),
    "changes weights": lambda nodes, code: nodes["linear"].update(target="aten.add_.Tensor"),
    "method": lambda nodes, code: nodes["linear"].update(op="call_method", target="numpy"),
    "constant": lambda nodes, code: nodes["linear"].update(args={"tuple": [{"torch": "load"}]}),
    "unknown node": lambda nodes, code: nodes["linear"].update(args={"tuple": [{"node": "nowhere"}]}),
}


@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_is_refused_and_nothing_runs(small, tmp_path, attack):
    _, folder = small
    flag = tmp_path / "flag"
    data = json.loads((folder / "graph.json").read_text())
    attack({node["name"]: node for node in data["nodes"]}, TOUCH.format(flag=flag))
    (folder / "graph.json").write_text(json.dumps(data))
    with pytest.raises(DataError):
        passes.load(folder)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "'input_ids' is missing"),
        ({"ids": tokens(2, 3)}, "unknown inputs"),
        ({"input_ids": tokens(2, 3).float()}, "dtype"),
        ({"input_ids": tokens(2, 3)[0]}, "shape"),
        ({"input_ids": [[1, 2]]}, "input_ids"),
        ({"input_ids": tokens(2, 3), "past_key_values": 3}, "past_key_values"),
        ({"input_ids": tokens(2, 3), "past_key_values": [(1, 2)]}, "past_key_values"),
    ],
)
def test_a_wrong_call_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        compiled("llama", "w4a16")(**given)


def test_an_empty_cache_of_transformers_is_an_empty_cache():
    import transformers

    made, ids = compiled("llama", "w4a16"), tokens(2, 5)
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=load("llama").model.config), []):
        assert torch.equal(made(ids, past_key_values=cache).logits, made(ids).logits)


@pytest.mark.parametrize("backend", ["onnx(threads=100_000)", "reference, onnx", "os", ""])
def test_a_folder_chooses_no_options_of_a_backend(small, backend):
    _, folder = small
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "backend": backend}))
    with pytest.raises(FxpressError):
        passes.load(folder)


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_not_copied(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tokenizer/tokenizer.json").symlink_to(tmp_path / "secret")
    compiled = passes.compile(Mlp(), "canonicalize", args=(vectors(),), tokenizer=tmp_path / "tokenizer")
    with pytest.raises(DataError, match="out of the folder"):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
