"""Fixtures shared by all tests."""

from collections.abc import Callable

import pytest
import torch

from tests.families import Family, load

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def families() -> Callable[..., Family]:
    """A captured model by the name of its family: captured once, every `graph()` a copy of its own."""
    return load
