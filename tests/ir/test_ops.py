import pytest
import torch

from ir import numerics, ops
from ir.encoding import Encoding
from ir.errors import OptionError

TEXTS = ["i8[1,-1]dynamic", "u8[-1]dynamic", "i4[1,8]dynamic"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_operators_pass_opcheck(text):
    x = torch.randn(2, 3, 20)
    scale, zero_point = ops.choose_qparams(x, text)
    kept = None if Encoding.parse(text).symmetric else zero_point
    codes = ops.quantize(x, scale, kept, text)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.choose_qparams, (x, text), test_utils=checks)
    torch.library.opcheck(ops.quantize, (x, scale, kept, text), test_utils=checks)
    torch.library.opcheck(ops.dequantize, (codes, scale, kept, text, torch.float32), test_utils=checks)


@pytest.mark.parametrize("text", [*TEXTS[::2], "f8e4m3[1,-1]dynamic"])
def test_they_do_what_numerics_says(text):
    x = torch.randn(4, 16)
    scale, _ = ops.choose_qparams(x, text)
    result = ops.dequantize(ops.quantize(x, scale, None, text), scale, None, text, torch.float32)
    assert torch.equal(result, numerics.fake_quantize(x, Encoding.parse(text)))


def test_they_survive_export_with_a_dynamic_batch():
    class Model(torch.nn.Module):
        def forward(self, x):
            scale, _ = torch.ops.fxpress.choose_qparams(x, "i8[1,-1]dynamic")
            codes = torch.ops.fxpress.quantize(x, scale, None, "i8[1,-1]dynamic")
            return torch.ops.fxpress.dequantize(codes, scale, None, "i8[1,-1]dynamic", torch.float32)

    program = torch.export.export(Model(), (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(7, 8)
    assert torch.equal(program.module()(x), Model()(x))


@pytest.mark.parametrize(("channels", "block"), [(24, 12), (704, 704), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hadamard_passes_opcheck_and_is_its_own_inverse(channels, block, dtype):
    x = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.library.opcheck(ops.hadamard, (x, block))
    torch.library.opcheck(ops.hadamard, (x.clone().requires_grad_(), block))
    y = ops.hadamard(x, block)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert (ops.hadamard(y, block) - x).norm() < 2 * torch.finfo(dtype).eps * x.norm()


def test_hadamard_has_gradients_of_both_orders():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.hadamard(x, 12), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.hadamard(x, 12).square(), x)


def test_hadamard_makes_a_contiguous_tensor_of_any():
    x = torch.randn(16, 5).T
    assert torch.allclose(ops.hadamard(x, 16), ops.hadamard(x.contiguous(), 16))
    torch.library.opcheck(ops.hadamard, (x, 16))


@pytest.mark.parametrize("block", [5, 0, 24])
def test_hadamard_refuses_blocks_that_do_not_fit(block):
    with pytest.raises(OptionError, match="nearest block for 16 channels"):
        ops.hadamard(torch.randn(2, 16), block)
    with pytest.raises(OptionError, match="nearest block for 16 channels"):
        ops.hadamard(torch.empty(2, 16, device="meta"), block)


def test_hadamard_survives_export_with_dynamic_sizes():
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.ops.fxpress.hadamard(x, 4)

    dim = torch.export.Dim
    program = torch.export.export(Model(), (torch.randn(3, 5, 8),), dynamic_shapes=({0: dim("batch"), 1: dim("length")},))
    x = torch.randn(7, 2, 8)
    assert torch.equal(program.module()(x), Model()(x))


@pytest.mark.parametrize("text", ["u4[1,-1]dynamic", "i2[1,-1]dynamic"])
def test_packing_passes_opcheck(text):
    x = torch.randn(2, 3, 20)
    scale, zero_point = ops.choose_qparams(x, text, torch.float16)
    assert scale.dtype == torch.float16
    codes = ops.quantize(x, scale, None if text[0] == "i" else zero_point, text)
    packed = ops.pack(codes, text)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.choose_qparams, (x, text, torch.float16), test_utils=checks)
    torch.library.opcheck(ops.pack, (codes, text), test_utils=checks)
    torch.library.opcheck(ops.unpack, (packed, text), test_utils=checks)
    assert torch.equal(ops.unpack(packed, text), codes)


@pytest.mark.parametrize(("codes", "message"), [(torch.zeros(2, 7, dtype=torch.uint8), "fill bytes"), (torch.zeros(2, 8), "uint8")])
def test_codes_that_cannot_be_packed_are_refused(codes, message):
    for device in ("cpu", "meta"):
        with pytest.raises(OptionError, match=message):
            ops.pack(codes.to(device), "u4[1,-1]dynamic")
