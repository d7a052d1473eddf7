import errno
import os
import threading
import time

import pytest
import safetensors.torch
import torch

from passes.memo import folder as memo
from passes.memo.folder import Memo

KEYS = [f"{index:064x}" for index in range(8)]
TENSORS = {"codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4), "scale": torch.rand(3, 1).half(), "none": torch.zeros(0)}


def same(found, tensors=TENSORS):
    return (
        found is not None
        and found.keys() == tensors.keys()
        and all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in tensors.items())
    )


def file_of(cache, key=KEYS[0]):
    return cache.folder / f"{key}.safetensors"


def test_what_was_put_is_got_and_nothing_else(tmp_path):
    cache = Memo(tmp_path / "deep" / "cache")
    assert cache.get(KEYS[0]) is None and not cache.has(KEYS[0])
    cache.put(KEYS[0], TENSORS, "codes of a layer", "Llama, w4a16")
    assert same(cache.get(KEYS[0])) and same(Memo(cache.folder).get(KEYS[0])) and cache.has(KEYS[0])
    assert cache.get(KEYS[1]) is None
    cache.put(KEYS[0], {"x": torch.ones(2)})
    assert same(cache.get(KEYS[0]), {"x": torch.ones(2)})
    cache.forget(KEYS[0])
    assert cache.get(KEYS[0]) is None and not cache.remarks()


def test_entries_are_listed_and_cleared_and_other_files_stay(tmp_path):
    cache = Memo(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"a model of the user")
    for key, what in zip(KEYS[:2], ("one", "other"), strict=True):
        cache.put(key, TENSORS, what, "Llama, w4a16")
        os.utime(file_of(cache, key), (0, time.time() - (100 if what == "one" else 10)))
    assert [(entry.what, entry.of) for entry in cache.entries()] == [("other", "Llama, w4a16"), ("one", "Llama, w4a16")]
    assert [entry.bytes for entry in cache.entries()] == [file_of(cache, key).stat().st_size for key in (KEYS[1], KEYS[0])]
    assert all(entry.made <= time.time() for entry in cache.entries())
    assert cache.clear() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] and not cache.entries()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("harm", [lambda content, place: content[:place], flipped])
def test_damage_is_found_told_once_and_removed(tmp_path, harm, share):
    cache = Memo(tmp_path)
    cache.put(KEYS[0], TENSORS)
    whole = file_of(cache).read_bytes()
    harmed = harm(whole, int(share * len(whole)))
    file_of(cache).write_bytes(harmed)
    found = cache.get(KEYS[0])
    if found is not None:  # a bit of what only `fxpress cache` shows
        assert same(found)
        return
    assert not cache.has(KEYS[0])
    (remark,) = cache.remarks()
    assert "damaged" in remark and not cache.remarks()
    cache.put(KEYS[0], TENSORS)
    assert same(cache.get(KEYS[0]))


def test_every_bit_of_every_tensor_counts(tmp_path):
    cache = Memo(tmp_path)
    cache.put(KEYS[0], TENSORS)
    whole = file_of(cache).read_bytes()
    data = len(whole) - sum(tensor.nbytes for tensor in TENSORS.values())
    for place in range(data, len(whole)):
        file_of(cache).write_bytes(flipped(whole, place))
        assert cache.get(KEYS[0]) is None


def test_an_entry_under_another_name_is_none(tmp_path):
    cache = Memo(tmp_path)
    cache.put(KEYS[0], TENSORS)
    file_of(cache).rename(file_of(cache, KEYS[1]))
    assert cache.get(KEYS[1]) is None


def test_what_was_used_least_recently_goes_first(tmp_path):
    size = 40_000
    cache = Memo(tmp_path, size=4 * size + 8000)
    for index, key in enumerate(KEYS[:4]):
        cache.put(key, {"x": torch.zeros(size, dtype=torch.uint8)})
        os.utime(file_of(cache, key), (0, 1000 + index))
    later = Memo(tmp_path, size=cache.size)
    assert later.get(KEYS[0]) is not None
    later.put(KEYS[4], {"x": torch.zeros(size, dtype=torch.uint8)})
    assert [key for key in KEYS if later.has(key)] == [KEYS[0], KEYS[3], KEYS[4]]
    assert not later.remarks()
    later.put(KEYS[5], {"x": torch.zeros(2 * size, dtype=torch.uint8)})
    later.put(KEYS[6], {"x": torch.zeros(2 * size, dtype=torch.uint8)})
    assert "too small" in later.remarks()[0]


def test_what_is_larger_than_all_of_it_is_not_kept(tmp_path):
    cache = Memo(tmp_path, size=1000)
    cache.put(KEYS[0], TENSORS)
    for _ in range(2):
        cache.put(KEYS[1], {"x": torch.zeros(2000, dtype=torch.uint8)})
    assert same(cache.get(KEYS[0])) and not cache.has(KEYS[1])
    assert len(cache.remarks()) == 1


def test_a_full_disk_is_told_once_and_nothing_is_kept_from_then_on(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = Memo(tmp_path)
    cache.put(KEYS[0], TENSORS)
    monkeypatch.setattr(memo, "save_file", full)
    cache.put(KEYS[1], TENSORS)
    cache.put(KEYS[2], TENSORS)
    (remark,) = cache.remarks()
    assert "No space left" in remark
    assert [path.name for path in tmp_path.iterdir()] == [file_of(cache).name]
    assert same(cache.get(KEYS[0]))


def test_a_folder_that_is_none_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    cache = Memo(tmp_path / "file")
    cache.put(KEYS[0], TENSORS)
    assert cache.get(KEYS[0]) is None and not cache.entries() and not cache.clear()
    assert len(cache.remarks()) == 1


def test_drafts_of_processes_that_are_gone_are_removed(tmp_path):
    gone, mine, young = (tmp_path / f".{KEYS[1]}.safetensors.{process}" for process in (2**22 + 1, os.getpid(), 2**22 + 2))
    for draft in (gone, mine, young):
        draft.write_bytes(b"half")
        os.utime(draft, (0, 0))
    os.utime(young)
    Memo(tmp_path).put(KEYS[0], TENSORS)
    assert not gone.exists() and mine.exists() and young.exists()


def test_two_at_once_see_whole_entries_or_none(tmp_path):
    stop, wrong = threading.Event(), []

    def use(seed):
        cache = Memo(tmp_path, size=30_000)
        cache.folder = tmp_path
        while not stop.is_set():
            for index, key in enumerate(KEYS):
                found = cache.get(key)
                if found is not None and not torch.equal(found["x"], torch.full((1000,), index)):
                    wrong.append(key)
                if index % 2 == seed:
                    cache.put(key, {"x": torch.full((1000,), index)})
        wrong.extend(cache.remarks() if any("damaged" in text or "written" in text for text in cache._remarks) else [])

    threads = [threading.Thread(target=use, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path / "own"))
    assert Memo().folder == tmp_path / "own"
    monkeypatch.delenv("FXPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Memo().folder == tmp_path / "fxpress"
    assert Memo.of(None) is None and Memo.of(False) is None
    assert Memo.of(True).folder == tmp_path / "fxpress" and Memo.of("here").folder.name == "here"


def test_an_entry_is_plain_data(tmp_path):
    cache = Memo(tmp_path)
    cache.put(KEYS[0], TENSORS, "codes", "Llama")
    with safetensors.safe_open(file_of(cache), framework="pt") as file:
        assert set(file.metadata()) == {"format", "key", "checksum", "what", "of", "made"}
        assert all(isinstance(value, str) for value in file.metadata().values())
