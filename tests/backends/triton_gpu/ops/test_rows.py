import pytest
import torch

from backends.triton_gpu.ops.rows import SHIFT, hadamard_quantize_rows, norm_quantize_rows, quantize_rows
from ir import ops
from ir.encoding import Encoding

ENCODINGS = ("i8[1,-1]dynamic", "i4[1,-1]dynamic", "u8[1,-1]dynamic*0.9")


@pytest.mark.parametrize("text", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_operators_in_their_place(text: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 64, dtype=dtype), torch.rand(64, dtype=dtype)
    rotated, normed = ops.hadamard(x, 32), torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    made = (quantize_rows(x, text), hadamard_quantize_rows(x, 32, text), norm_quantize_rows(x, weight, 1e-5, text))
    for value, (codes, scale, zero) in zip((x, rotated, normed), made, strict=True):
        expected, z = ops.choose_qparams(value, text)
        shift = 0 if Encoding.parse(text).symmetric else SHIFT
        assert torch.equal(scale, expected) and torch.equal(zero.to(torch.int16), z.to(torch.int16) - shift)
        assert torch.equal(codes.to(torch.int16), ops.quantize(value, scale, z if shift else None, text).to(torch.int16) - shift)


def test_they_are_operators_as_torch_wants_them() -> None:
    x = torch.randn(2, 3, 64)
    torch.library.opcheck(quantize_rows, (x, ENCODINGS[0]))
    torch.library.opcheck(hadamard_quantize_rows, (x, 32, ENCODINGS[1]))
    torch.library.opcheck(norm_quantize_rows, (x, None, 1e-6, ENCODINGS[2]))


@pytest.mark.parametrize("name", ["quantize_rows", "norm_quantize_rows", "hadamard_quantize_rows", "hadamard"])
def test_on_gpus_they_have_kernels_of_their_own(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxpress::{name}", "CUDA")
