"""What launchers share: the architecture they launch for, and the grid's sizes."""

from functools import cache

import torch
from torch import Tensor

from backends.triton_gpu.kernels.interpreter import INTERPRETED

INTERPRETED_ARCH = 90  # what the interpreter stands for


def arch_of(x: Tensor) -> int:
    """The compute capability of the device of `x`, 90 for 9.0."""
    return _capability(x.device.index or 0) if x.is_cuda else INTERPRETED_ARCH


@cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def written(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes what a launcher returns as `dtype`: the interpreter cuts bfloat16 off instead of rounding it."""
    return torch.float32 if INTERPRETED.value and dtype == torch.bfloat16 else dtype
