import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ir.errors import DataError
from ir.tensor_file import ALIGNED, DTYPES, LENGTH, read_header, write_tensors


class Given:
    """A tensor in parts of some rows."""

    def __init__(self, tensor, rows):
        self.tensor, self.rows, self.dtype, self.shape = tensor, rows, tensor.dtype, tensor.shape

    def pieces(self):
        return self.tensor.split(self.rows) if self.tensor.ndim and self.tensor.numel() else [self.tensor]


def tensors():
    made = {name: torch.randint(0, 2, (9, 3)).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    return {**made, "empty": torch.empty(0, 4), "one": torch.tensor(2.0), "large": torch.randn(64, 64), "turned": torch.randn(6, 8).t()}


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_library_reads_what_is_written_in_pieces(tmp_path, rows):
    made = tensors()
    write_tensors(tmp_path / "a", {name: Given(tensor, rows) for name, tensor in made.items()})
    found = load_file(tmp_path / "a")
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor))


def test_headers_of_the_library_are_read(tmp_path):
    made = tensors()
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, tmp_path / "a", metadata={"format": "pt"})
    entries, start = read_header(tmp_path / "a")
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {n: (t.dtype, tuple(t.shape)) for n, t in made.items()}
    assert start + max(entry.end for entry in entries.values()) == (tmp_path / "a").stat().st_size


def test_whole_lines_of_memory_come_first_and_start_aligned(tmp_path):
    made = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(64, dtype=torch.uint8), "c": torch.zeros(1000, 16)}
    write_tensors(tmp_path / "a", {name: Given(tensor, 100) for name, tensor in made.items()})
    entries, start = read_header(tmp_path / "a")
    assert start % ALIGNED == entries["b"].begin % ALIGNED == entries["c"].begin % ALIGNED == 0


def test_dtypes_that_torch_does_not_have_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(LENGTH, "little") + header + b"\0\0\0")
    with pytest.raises(DataError, match="F6_E2M3"):
        read_header(tmp_path / "a")
