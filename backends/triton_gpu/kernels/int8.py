"""The launcher of `fxpress::packed_linear_int8`."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from backends.triton_gpu import layout
from backends.triton_gpu.kernels.int8_kernels import linear_kernel, sum_kernel
from backends.triton_gpu.kernels.interpreter import INTERPRETED
from ir.errors import OptionError

# A sum of 32 bits holds this many products: of centred codes with activations, and of those with zero points on both sides.
EXACT, EXACT_WITH_ZEROS = 2**17, 2**15
SHARED, PROCESSORS = 99 << 10, 132  # bytes of shared memory and multiprocessors where no device says its own


@dataclass(frozen=True)
class Config:
    """How the kernel is cut: tiles of weights and tokens, runs of 32 k in a step, parts of K, warps, and steps in flight."""

    block_n: int
    block_m: int
    runs: int
    splits: int
    warps: int
    stages: int

    def shared(self, bits: int) -> int:
        """Bytes of shared memory that steps in flight take."""
        return self.stages * self.runs * layout.LANES * (self.block_n * bits // 8 + self.block_m)


def choose(M: int, N: int, K: int, bits: int, shared: int = SHARED, processors: int = PROCESSORS) -> Config:
    """The configuration for activations `[M, K]` and weights `[N, K]` of `bits` bits, on a device of so much shared memory."""
    few = M <= 64
    block_m = min(128, max(8, triton.next_power_of_2(M)))
    least = 8 // min(layout.PLANES[bits])  # a block of the narrowest plane
    found = Config(128, block_m, max(least, 8 if few else 4), 1, 4 if few else 8, 4)
    if found.shared(bits) > shared and found.runs > max(least, 4):
        found = replace(found, runs=max(least, 4))
    while found.shared(bits) > shared and found.stages > 2:
        found = replace(found, stages=found.stages - 1)
    tiles = triton.cdiv(N, found.block_n) * triton.cdiv(M, block_m)
    steps = triton.cdiv(K, layout.LANES * found.runs)
    return replace(found, splits=max(1, min(2 * processors // tiles, steps // 4)) if few else 1)


def packed_linear_int8(
    codes: Tensor,
    input_scale: Tensor,
    input_zero: Tensor | None,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """The kernel of the operator of this name; `config` replaces the chosen configuration.

    Raises:
        OptionError: groups are no multiple of 32, or the offset none of `2^(bits−8)`.
    """
    K, N = codes.shape[-1], scale.shape[1]
    out = torch.empty(*codes.shape[:-1], N, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    grouped = group < K
    if grouped and group % layout.LANES:
        raise OptionError(f"the int8 kernel scales groups of a multiple of {layout.LANES} columns, not of {group}")
    delta = 2.0 ** (8 - bits) * offset
    if zero is None and delta != int(delta):
        raise OptionError(f"the int8 kernel takes offsets in steps of {2.0 ** (bits - 8)} at {bits} bits, not {offset}")
    centre = 64 if bits == 1 else 128
    delta = -centre if zero is not None else int(delta) - centre
    x = codes.reshape(-1, K).contiguous()
    M = len(x)
    cut = config or choose(M, N, K, bits, *_device(codes))
    steps, splits = _parts(K, cut, grouped, zero is not None or input_zero is not None or delta != 0)
    parts = torch.empty(splits, M, N, dtype=torch.float32 if grouped else torch.int32, device=x.device) if splits > 1 else out
    none = scale  # in the place of a pointer that is not read
    linear_kernel[(triton.cdiv(N, cut.block_n), triton.cdiv(M, cut.block_m), splits)](
        x,
        input_scale,
        none if input_zero is None else input_zero,
        *[*planes, *[none] * (3 - len(planes))],
        scale,
        none if zero is None else zero,
        none if bias is None else bias,
        parts,
        M,
        N,
        K,
        steps,
        BITS=bits,
        PLANES=layout.PLANES[bits],
        GROUP=group if grouped else 0,
        FLUSH=math.gcd(group // layout.LANES, cut.runs) if grouped else 0,
        DELTA=delta,
        ZERO=zero is not None,
        CENTRED=zero is None and delta == 0,
        INPUT_ZERO=input_zero is not None,
        TOKENS=int(input_scale.numel() > 1),
        BIAS=bias is not None,
        EVEN=K % (layout.LANES * cut.runs) == 0,
        SPLIT=splits > 1,
        RUNS=cut.runs,
        BLOCK_N=cut.block_n,
        BLOCK_M=cut.block_m,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    if splits > 1:
        sum_kernel[(triton.cdiv(M * N, 512),)](
            parts,
            input_scale,
            scale,
            none if bias is None else bias,
            out,
            M,
            N,
            splits,
            BITS=bits,
            GROUPED=grouped,
            TOKENS=int(input_scale.numel() > 1),
            BIAS=bias is not None,
            BLOCK=512,
        )
    return out


def _parts(K: int, cut: Config, grouped: bool, zeros: bool) -> tuple[int, int]:
    """Steps of a part of K, and how many parts: no more than asked, unless a sum over a part could leave 32 bits."""
    step = layout.LANES * cut.runs
    steps = triton.cdiv(triton.cdiv(K, step), cut.splits)
    if not grouped:
        steps = min(steps, max(1, (EXACT_WITH_ZEROS if zeros else EXACT) // step - 1))
    return steps, triton.cdiv(triton.cdiv(K, step), steps)


def _device(x: Tensor) -> tuple[int, int]:
    if INTERPRETED.value:
        return SHARED, PROCESSORS
    properties = torch.cuda.get_device_properties(x.device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count
