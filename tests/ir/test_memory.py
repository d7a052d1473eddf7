import sys
from pathlib import Path

import pytest
import torch

from ir.memory import give_back


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their own counsel")
def test_what_is_freed_between_what_is_held_goes_back():
    parts = [torch.ones(16 << 10) for _ in range(1000)]  # 64 MB, in pieces that the C library takes from its heap
    held = parts[::10]
    full = resident()
    del parts
    give_back()
    assert resident() < full - 30e6
    assert all(float(part.sum()) == 16 << 10 for part in held)
