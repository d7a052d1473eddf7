"""Packed weights for kernels, and results to compare with."""

from typing import Any

import torch
from torch import Tensor

from backends.triton_gpu import layout

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}  # of the greatest result: a last place or two


def packed(bits: int, n: int, k: int, group: int, dtype: torch.dtype, *, zero: bool, bias: bool, container: int = 16) -> dict[str, Any]:
    """Arguments of `packed_linear` but for activations: random codes, scales in `dtype`, zero points around the middle."""
    made = torch.Generator().manual_seed(bits * 1000 + n + k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=made)
    groups = -(-k // group)
    return {
        "planes": layout.pack(codes, bits, container),
        "scale": (torch.rand(groups, n, generator=made) + 0.5).to(dtype),
        "zero": torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8, generator=made) if zero else None,
        "bias": torch.randn(n, generator=made).to(dtype) if bias else None,
        "bits": bits,
        "group": group,
        "offset": 0.5 if bits == 1 else 2.0 ** (bits - 1),
    }


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _moved(value, device) for name, value in arguments.items()}


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, list):
        return [_moved(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    scale = expected.float().abs().max()
    torch.testing.assert_close(found.cpu().float() / scale, expected.float() / scale, rtol=0, atol=TOLERANCE[expected.dtype])
