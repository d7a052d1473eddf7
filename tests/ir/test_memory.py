import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ir import memory
from ir.memory import give_back


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their own counsel")
def test_what_is_freed_between_what_is_held_goes_back(monkeypatch):
    parts = [torch.ones(16 << 10) for _ in range(1000)]  # 64 MB, in pieces that the C library takes from its heap
    held = parts[::10]
    full = resident()
    del parts
    monkeypatch.setattr(memory, "_due", [0.0])
    give_back()
    assert resident() < full - 30e6
    assert all(float(part.sum()) == 16 << 10 for part in held)


def test_calls_soon_after_one_another_do_nothing(monkeypatch):
    looks = []
    monkeypatch.setattr(memory.gc, "collect", lambda: looks.append(None))
    monkeypatch.setattr(memory, "_due", [0.0])
    monkeypatch.setattr(memory, "SHARE", 1e-6)
    for _ in range(5):
        give_back()
    assert len(looks) == 1
    monkeypatch.setattr(memory, "_due", [0.0])
    give_back()
    assert len(looks) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their own counsel")
def test_large_tensors_are_mapped_and_go_as_they_go():
    script = """
import sys, torch
from pathlib import Path
from ir.memory import map_large
if sys.argv[1] == "mapped":
    map_large()
del (at := [torch.ones(4 << 20)])[:]  # after which the C library would take 16 MB from its heap
parts = [torch.ones(1 << 20) for _ in range(40)]
full = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
held = parts[1::2]
del parts
print((full - int(Path("/proc/self/statm").read_text().split()[1]) * 4096) // (4 << 20))
"""
    freed = {
        how: int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
        for how in ("mapped", "heap")
    }
    assert freed["mapped"] >= 19 > freed["heap"] + 5
