"""Fixtures shared by all tests.

Kernels run in Triton's interpreter, on CPUs: the variable is read when a kernel is defined, and torch may import triton before any test
does, so it is set here, before either. `TRITON_INTERPRET=0` runs the same tests on a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint import write_checkpoint
from tests.families import Family, load

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of commands is a folder of the test's own, which is made when something is kept there, and never the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache" / uuid.uuid4().hex
    monkeypatch.setenv("FXPRESS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def families() -> Callable[..., Family]:
    """A captured model by the name of its family: captured once, every `graph()` a copy of its own."""
    return load


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, `tiny-llama/`, and texts for it, `calibration.txt` and `test.txt`. Write nothing into it."""
    return write_checkpoint(tmp_path_factory.mktemp("fixtures"))
