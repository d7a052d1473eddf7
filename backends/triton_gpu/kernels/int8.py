"""The launcher of `fxpress::packed_linear_int8`."""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from backends.triton_gpu import layout
from backends.triton_gpu.kernels.int8_kernels import linear_kernel, sum_kernel
from backends.triton_gpu.kernels.launch import arch_of
from backends.triton_gpu.select import DEVICES, Config, near, timed
from ir.errors import OptionError

# A sum of 32 bits holds fewer products than these: of centred codes with activations, and of those with zero points on both sides.
EXACT, EXACT_WITH_ZEROS = 2**17, 2**15
FEW = 64  # tokens up to which a program has one warp group
SMALLER = (("stages", 3), ("stages", 2), ("spans", 1), ("tile_n", 128), ("tile_m", 64))  # until a form fits
SUMMED = 512  # outputs of a program that adds parts


def choose(bits: int, m: int, n: int, k: int, group: int, arch: int, zeros: bool = False) -> Config:
    """The form for `m` tokens and a weight `[n, k]` of `bits` bits with scales for `group` columns, on an architecture as 90.

    A timed one if there is one; those are of weights without zero points. Else a rule, not checked against a clock: steps as long and as
    many in flight as shared memory holds; for many tokens large tiles, as far as there is one for every processor, and registers for sums
    of groups, those of zero points too, beside their total.
    """
    if not zeros and (known := timed("packed_linear_int8", bits, m, n, k, group, arch)):
        return known
    arch = near(arch)
    device = DEVICES[arch]
    few, least = m <= FEW, runs_of(bits, 1)
    greatest = 128 if group >= k or not zeros else 64 if least < 8 else 16
    tile_m = min(greatest, max(8, triton.next_power_of_2(m)))
    wide = not few and not zeros and group >= k and triton.cdiv(n, 256) * triton.cdiv(m, tile_m) >= device.processors
    long = few and (tile_m < 64 or greatest == 128) and (arch >= 90 or group >= k)  # scales of two groups in a step spill before Hopper
    runs, warps = (8, 4) if long else (4, 8 if tile_m > (FEW if few and not zeros else 16) else 4)
    found = Config("linear", tile_m, 256 if wide else 128, max(1, runs // least), 1, warps, 4)
    for field, most in SMALLER:
        if shared(found, bits) > device.shared:
            found = replace(found, **{field: min(most, getattr(found, field))})
    tiles = triton.cdiv(n, found.tile_n) * triton.cdiv(m, found.tile_m)
    steps = triton.cdiv(k, layout.LANES * runs_of(bits, found.spans))
    return replace(found, split=max(1, min(2 * device.processors // tiles, steps // 4)))


def runs_of(bits: int, spans: int) -> int:
    """Runs of 32 k in so many blocks of the narrowest plane."""
    return spans * 8 // min(layout.PLANES[bits])


def shared(config: Config, bits: int) -> int:
    """Bytes of shared memory that steps in flight take."""
    return config.stages * runs_of(bits, config.spans) * layout.LANES * (config.tile_n * bits // 8 + config.tile_m)


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
    x = codes.reshape(-1, K).contiguous()
    M = len(x)
    zeros = (zero is not None, input_zero is not None)
    form = config or choose(bits, M, N, K, group, arch_of(codes), any(zeros))
    fixed = constants(bits, K, group, offset, zeros, input_scale.numel() == M, bias is not None, form)
    steps, splits = parts_of(K, fixed["RUNS"], form.split, group < K, not fixed["CENTRED"] or zeros[1])
    kind = torch.float32 if group < K else torch.int32
    parts = torch.empty(splits, M, N, dtype=kind, device=x.device) if splits > 1 else out
    none = scale  # in the place of a pointer that is not read
    pointers = (none if input_zero is None else input_zero, *[*planes, *[none] * (3 - len(planes))], scale)
    further = (none if zero is None else zero, none if bias is None else bias)
    linear_kernel[(triton.cdiv(N, form.tile_n), triton.cdiv(M, form.tile_m), splits)](
        x, input_scale, *pointers, *further, parts, M, N, K, steps,
        **fixed, SPLIT=splits > 1, num_warps=form.warps, num_stages=form.stages,
    )  # fmt: skip
    if splits > 1:
        sum_kernel[(triton.cdiv(M * N, SUMMED),)](
            parts, input_scale, scale, further[1], out, M, N, splits,
            **{name: fixed[name] for name in ("BITS", "GROUP", "TOKENS", "BIAS")}, BLOCK=SUMMED,
        )  # fmt: skip
    return out


def constants(
    bits: int, k: int, group: int, offset: float, zeros: tuple[bool, bool], tokens: bool, bias: bool, form: Config
) -> dict[str, Any]:
    """The constant arguments of `linear_kernel`, but for `SPLIT`; `zeros` of weights and of activations.

    Raises:
        OptionError: groups are no multiple of 32, or the offset none of `2^(bits−8)`.
    """
    if group < k and group % layout.LANES:
        raise OptionError(f"the int8 kernel scales groups of a multiple of {layout.LANES} columns, not of {group}")
    delta = 0.0 if zeros[0] else 2.0 ** (8 - bits) * offset
    if delta != int(delta):
        raise OptionError(f"the int8 kernel takes offsets in steps of {2.0 ** (bits - 8)} at {bits} bits, not {offset}")
    delta, runs = int(delta) - (64 if bits == 1 else 128), runs_of(bits, form.spans)
    return {
        "BITS": bits, "PLANES": layout.PLANES[bits], "RUNS": runs, "BLOCK_N": form.tile_n, "BLOCK_M": form.tile_m,
        "GROUP": group if group < k else 0, "FLUSH": math.gcd(group // layout.LANES, runs) if group < k else 0,
        "DELTA": delta, "ZERO": zeros[0], "CENTRED": not zeros[0] and delta == 0, "INPUT_ZERO": zeros[1],
        "TOKENS": int(tokens), "BIAS": bias, "EVEN": k % (layout.LANES * runs) == 0,
    }  # fmt: skip


def parts_of(K: int, runs: int, split: int, grouped: bool, zeros: bool) -> tuple[int, int]:
    """Steps of a part of K, and how many parts: no more than asked, unless a sum over a part could leave 32 bits."""
    step = layout.LANES * runs
    steps = triton.cdiv(triton.cdiv(K, step), split)
    if not grouped:
        steps = min(steps, ((EXACT_WITH_ZEROS if zeros else EXACT) - 1) // step)
    return steps, triton.cdiv(triton.cdiv(K, step), steps)
