"""Launchers without a GPU: Triton compiles for one that is not there, and starts nothing.

`TRITON_INTERPRET=0 python -m tests.backends.triton_gpu.kernels.dry_launch linears`, or `integers`, prints each kernel that is launched with
its grid, and how many were compiled.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from backends.triton_gpu import layout
from backends.triton_gpu.kernels import cache, hadamard, int8, rows, weight_only
from backends.triton_gpu.select import Config
from tests.backends.triton_gpu.kernels.samples import packed

COMPILED: list[str] = []


class Launched:
    """What Triton makes of a compiled kernel to start it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name
        COMPILED.append(self.name)

    def __call__(self, x: int, y: int, z: int, *arguments: object) -> None:
        print(self.name, x, y, z)


class DryDriver:
    """A driver of one Hopper GPU that is not there."""

    launcher_cls = Launched
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10}, load_binary=lambda *_: (object(), object(), 64, 0, 1024)
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def linears() -> None:
    x = torch.randn(3, 256).to(torch.float16)
    arguments = packed(4, 128, 256, 64, torch.float16, zero=True, bias=True)
    for config in (Config(tile_n=64, split=2), Config("dequantize")):
        for tokens in (1, 3):  # the same kernels
            weight_only.linear(x[:tokens], **arguments, config=config)


def integers() -> None:
    """A block of W4A4 with a quantized cache, of one token and of three."""
    planes = layout.pack(torch.zeros(64, 256, dtype=torch.uint8), 4, 8)
    scale, config = torch.ones(1, 64), Config(tile_n=64, split=2)
    for tokens in (1, 3):
        x = torch.randn(tokens, 256).to(torch.float16)
        rows.norm_quantize_rows(x, x[0], 1e-5, "i4[1,-1]dynamic")
        codes, s, _ = hadamard.hadamard_quantize_rows(x, 256, "i4[1,-1]dynamic")
        int8.packed_linear_int8(codes, s, None, planes, scale, None, None, 4, 256, 8.0, x.dtype, config)
        kept = cache.quantize_cache(x, "u4[1,32]dynamic", torch.float16)
        cache.dequantize_cache(*kept, "u4[1,32]dynamic", x.dtype)


def main() -> None:
    driver.set_active(DryDriver())
    {"linears": linears, "integers": integers}[sys.argv[1]]()
    print("compiled", len(COMPILED))


if __name__ == "__main__":
    main()
