"""Where kernels run: in the interpreter on the CPU, or with `TRITON_INTERPRET=0` on a GPU."""

import pytest
import torch

from backends.triton_gpu.kernels.interpreter import INTERPRETED


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED.value else "cuda")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds no numbers, so that a kernel which leaves a place out is seen."""
    empty = torch.empty

    def filled(*size: object, **options: object) -> torch.Tensor:
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", filled)
