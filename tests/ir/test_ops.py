import pytest
import torch

from ir import numerics, ops
from ir.encoding import Encoding

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
