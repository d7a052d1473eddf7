import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ir.deferred import READ, Deferred, counted
from ir.errors import DataError
from ir.store import HANDED_OUT, Store
from ir.tensor_file import write_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.int64]


def tensors():
    """One of several dtypes, and those without elements, without axes, and of other strides."""
    filled = {str(dtype): torch.arange(240, dtype=torch.uint8).view(dtype).reshape(3, -1) for dtype in DTYPES}
    return filled | {
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "transposed": torch.linspace(0, 1, 15).reshape(3, 5).T,
        "long name.weight_é": torch.linspace(0, 1, 5),
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "text": 'é "quoted"'}])
def test_what_is_written_is_what_the_library_reads(tmp_path, metadata):
    given = tensors()
    write_tensors(tmp_path / "file", {name: Deferred.of(tensor) for name, tensor in given.items()}, metadata)
    read = load_file(tmp_path / "file")
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == metadata


def test_one_tensor_is_there_at_a_time(tmp_path):
    made = []

    def make(index):
        assert not any(reference() is not None for reference in made)
        tensor = torch.full((4, 8), float(index))
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    write_tensors(tmp_path / "file", {f"{i}": Deferred(torch.float32, (4, 8), lambda i=i: make(i)) for i in range(5)})
    assert len(made) == 5
    assert all(bool((tensor == float(name)).all()) for name, tensor in load_file(tmp_path / "file").items())


def fail():
    raise OSError(28, "No space left on device")


WRONG = {
    "another shape": (lambda: torch.zeros(4), DataError),
    "another dtype": (lambda: torch.zeros(3, dtype=torch.float64), DataError),
    "an error midway": (fail, OSError),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_failure_leaves_what_was_there(tmp_path, case):
    make, error = WRONG[case]
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_tensors(tmp_path / "file", {"a": Deferred.of(torch.zeros(64)), "z": Deferred(torch.float32, (3,), make)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_making_is_counted(tmp_path, monkeypatch):
    released = []
    store = Store(tmp_path)
    monkeypatch.setattr(store, "release", lambda: released.append(True))
    size = HANDED_OUT // READ // 4
    tensor = counted(Deferred(torch.uint8, (size,), lambda: torch.zeros(1, dtype=torch.uint8).expand(size)), store)
    for _ in range(3):
        assert next(tensor.pieces()).shape == (size,)
    assert not released
    next(tensor.pieces())
    assert released
