import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ir.errors import DataError
from ir.shards import _NAMES, CHUNK, Deferred, write_tensors


def tensors():
    """One of every dtype, and those without elements, without axes, and of other strides."""
    filled = {str(dtype): torch.arange(240, dtype=torch.uint8).view(dtype).reshape(3, -1) for dtype in _NAMES if dtype != torch.bool}
    return filled | {
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "long name.weight_é": torch.linspace(0, 1, 5),
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"text": 'é "quoted"\n'}])
def test_a_file_is_the_librarys_own_byte_for_byte(tmp_path, metadata):
    given = tensors()
    write_tensors(tmp_path / "ours", given, metadata)
    save_file(given, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == metadata


def test_tensors_come_back_from_any_strides_and_in_chunks(tmp_path):
    given = {"transposed": torch.randn(6, 4).T, "expanded": torch.ones(1, 3).expand(5, 3), "long": torch.randn(CHUNK // 2 + 3)}
    write_tensors(tmp_path / "file", given)
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in given.items())


def test_no_tensors_are_a_file_too(tmp_path):
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


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
    "no such dtype": (torch.zeros(2, dtype=torch.complex128), DataError),
    "another shape": (Deferred(torch.float32, (3,), lambda: torch.zeros(4)), DataError),
    "another dtype": (Deferred(torch.float32, (3,), lambda: torch.zeros(3, dtype=torch.float64)), DataError),
    "an error midway": (Deferred(torch.int8, (3,), fail), OSError),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_failure_leaves_what_was_there(tmp_path, case):
    tensor, error = WRONG[case]
    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_tensors(tmp_path / "file", {"a": torch.zeros(9), "z": tensor})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"
