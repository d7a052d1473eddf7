import pytest
import torch

from backends.triton_gpu.kernels.dequantize import dequantize
from backends.triton_gpu.ops.linear import weight_values
from tests.backends.triton_gpu.kernels.samples import on, packed


@pytest.mark.parametrize(
    ("bits", "dtype", "n", "k", "group", "zero"),
    [
        (1, torch.float16, 33, 300, 300, False),
        (3, torch.bfloat16, 32, 512, 128, False),
        (4, torch.float32, 45, 296, 32, True),
        (6, torch.float16, 32, 256, 256, True),
        (8, torch.bfloat16, 20, 200, 64, False),
    ],
)
def test_weights_are_written_as_they_are(
    bits: int, dtype: torch.dtype, n: int, k: int, group: int, zero: bool, device: torch.device
) -> None:
    arguments = packed(bits, n, k, group, dtype, zero=zero, bias=False)
    del arguments["bias"]
    written = dequantize(**on(device, arguments), columns=k, dtype=dtype)
    assert torch.equal(written.cpu(), weight_values(**arguments, columns=k).to(dtype))
