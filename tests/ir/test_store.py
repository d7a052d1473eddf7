import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ir import edit, store
from ir.errors import DataError
from ir.store import SMALL, Store, attach, kept_parameters, store_of
from tests.ir.graphs import traced

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.int64]


def resident():
    """Bytes of files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_kept_has_the_same_bits(tmp_path, dtype, apart):
    x = torch.randint(0, 2, (300, 200)).to(dtype)
    kept = Store(tmp_path).keep(x, apart=apart)
    assert kept.data_ptr() != x.data_ptr()
    assert (kept.dtype, kept.shape, kept.stride()) == (x.dtype, x.shape, x.stride())
    assert torch.equal(bits(kept), bits(x))


def test_strides_of_dense_tensors_stay(tmp_path):
    x = torch.randn(40, 50, 60).permute(2, 0, 1)
    kept = Store(tmp_path).keep(x)
    assert kept.stride() == x.stride()
    assert torch.equal(kept, x)


def test_parts_of_tensors_are_kept_by_themselves(tmp_path):
    x = torch.randn(400, 400)[:, ::2]
    kept = Store(tmp_path).keep(x)
    assert torch.equal(kept, x)
    assert kept.untyped_storage().nbytes() == x.numel() * 4


def test_kept_tensors_lie_as_torch_aligns_memory(tmp_path):
    own = Store(tmp_path)
    assert all(own.keep(torch.randn(5000 + i)).data_ptr() % 64 == 0 for i in range(5))


def test_small_and_mapped_tensors_are_given_back(tmp_path):
    own = Store(tmp_path)
    small, large = torch.zeros(SMALL - 1, dtype=torch.uint8), torch.zeros(SMALL, dtype=torch.uint8)
    assert own.keep(small) is small
    kept = own.keep(large)
    assert own.holds(kept)
    assert own.keep(kept) is kept
    view = kept[10:]
    assert own.keep(view) is view
    meta = torch.empty(SMALL, device="meta")
    assert own.keep(meta) is meta


def test_many_tensors_of_one_file_do_not_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARED_FILE", 1 << 18)
    own = Store(tmp_path)
    tensors = [torch.full((SMALL + i,), i, dtype=torch.uint8) for i in range(60)]
    kept = [own.keep(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


def test_released_pages_come_back(tmp_path):
    own = Store(tmp_path)
    x = torch.randn(1 << 23)
    kept = own.keep(x)
    assert torch.equal(kept, x)
    before = resident()
    own.release()
    assert resident() < before - x.nbytes // 2
    kept.add_(1)
    own.release()
    assert torch.equal(kept, x + 1)


def test_pages_are_released_as_tensors_are_counted(tmp_path, monkeypatch):
    own, released = Store(tmp_path), []

    def release(self):
        released.append(self)

    monkeypatch.setattr(Store, "release", release)
    own.count(store.HANDED_OUT // 2)
    assert not released
    own.count(store.HANDED_OUT)
    assert released == [own]


def test_a_store_that_moved_holds_what_it_held(tmp_path, monkeypatch):
    own, folders, make = Store(tmp_path), [], store.tempfile.TemporaryFile
    first, moved = own.keep(torch.randn(1 << 14)), own.moved(tmp_path.parent)
    monkeypatch.setattr(store.tempfile, "TemporaryFile", lambda **where: folders.append(where["dir"]) or make(**where))
    second = moved.keep(torch.randn(1 << 14))
    assert folders == [tmp_path.parent]
    assert moved.holds(first) and moved.holds(second)


def test_files_go_away_with_the_tensors(tmp_path):
    own = Store(tmp_path)
    kept = own.keep(torch.randn(1 << 20))
    assert not list(tmp_path.iterdir())  # they have no name
    copied = kept.clone()
    del own
    assert torch.equal(kept, copied)


def test_the_disk_is_full(tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return getattr(self.file, name)

        def __init__(self, file):
            self.file = file

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = store.tempfile.TemporaryFile
    monkeypatch.setattr(store.tempfile, "TemporaryFile", lambda **where: Full(made(**where)))
    with pytest.raises(DataError, match="No space left") as found:
        Store(tmp_path).keep(torch.randn(1 << 14))
    assert str(tmp_path) in str(found.value)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        Store(tmp_path / "none").keep(torch.randn(1 << 14))


def test_a_file_of_tensors_is_mapped(tmp_path):
    tensors = {str(dtype): torch.randint(0, 2, (7, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0, 3), "one": torch.tensor(3.0), "large": torch.randn(500, 500)}
    save_file(tensors, tmp_path / "a.safetensors")
    own = Store()
    found = own.open(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor))
    assert own.holds(found["large"])
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}) == len(found) - 1


def test_what_is_written_to_loaded_weights_stays_and_the_file_too(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(500, 500), "b": torch.ones(500, 500)}, path)
    content = path.read_bytes()
    own = Store()
    found = own.open(path)
    found["a"].mul_(2)
    own.release()
    assert found["a"].eq(2).all()
    assert found["b"].eq(1).all()
    assert path.read_bytes() == content


@pytest.mark.parametrize("length", [0, 4, 40, 200])
def test_damaged_files_are_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(50, 50)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match="not a file of tensors"):
        Store().open(path)


def test_graphs_keep_what_they_are_given(tmp_path):
    gm = traced(lambda x: x + 1, torch.randn(2, 3))
    gm.meta[edit.STORE] = own = Store(tmp_path)
    first = next(iter(gm.graph.nodes)).next
    node = edit.add_attribute(gm, "table", torch.randn(200, 200), before=first)
    assert own.holds(edit.attribute(gm, node))
    edit.set_attribute(gm, node, torch.randn(300, 200))
    assert own.holds(edit.attribute(gm, node))
    assert edit.copied(gm).meta[edit.STORE] is own


def test_parameters_are_kept_as_a_model_is_made(tmp_path):
    own = Store(tmp_path)
    with kept_parameters(own):
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    assert [own.holds(parameter) for parameter in model.parameters()] == [True, False, False, False]
    assert not own.holds(nn.Linear(100, 100).weight)


def test_copies_of_a_model_share_its_store(tmp_path):
    model, own = nn.Linear(100, 100), Store(tmp_path)
    assert store_of(model) is None
    attach(model, own)
    assert store_of(copy.deepcopy(model)) is own


def test_runs_of_a_model_count_its_weights(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(Store, "count", lambda self, size: counted.append(size))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    attach(model, Store(tmp_path))
    model(torch.randn(2, 3))
    assert counted == [(12 + 4) * 4, (20 + 5) * 4]
