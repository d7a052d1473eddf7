import sys

import pytest
import torch

from ir.memory import give_back
from passes.preflight import resources
from passes.preflight.resources import existing, free_disk, free_memory, memory, size_of, watched

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


@linux
def test_the_most_memory_of_a_block_is_seen_after_it_is_given_back():
    give_back()
    before = memory().resident
    with watched() as peak:
        taken = torch.ones(200 << 20, dtype=torch.uint8)
        del taken
    assert peak.resident > before + (100 << 20)
    assert 0 < peak.own <= peak.resident


@linux
def test_pages_of_files_are_not_its_own(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(50 << 20))
    before = memory()
    mapped = torch.from_file(str(path), size=50 << 20, dtype=torch.uint8)
    mapped.sum()
    after = memory()
    assert after.resident - before.resident > 40 << 20
    assert after.own - before.own < 20 << 20


@linux
def test_free_memory_is_no_more_than_the_group_may_have(tmp_path, monkeypatch):
    assert free_memory() > 0
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 100\n")
    monkeypatch.setattr(resources, "GROUPS", ((tmp_path / "max", tmp_path / "current"),))
    assert free_memory() == 1100
    (tmp_path / "max").write_text("max\n")
    assert free_memory() > 1100


def test_where_nothing_is_told_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "STATUS", tmp_path / "none")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(resources, "GROUPS", ())
    assert free_memory() is None
    assert memory() == resources.Memory(0, 0)


def test_sizes_of_folders_and_disks(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "below" / "b").write_bytes(bytes(11))
    assert size_of(tmp_path) == 111
    assert existing(tmp_path / "below" / "not" / "yet") == tmp_path / "below"
    assert free_disk(tmp_path / "not yet") > 0
