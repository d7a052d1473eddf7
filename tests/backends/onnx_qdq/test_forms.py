"""Every row of the table of forms: fused as promised, equal to the reference."""

import pytest
import torch

from backends.onnx_qdq import OnnxQdq
from backends.onnx_qdq.forms import BLOCKED, block_size, stored_width
from ir.capture import capture
from ir.encoding import Encoding
from ir.errors import BackendError
from tests.backends.onnx_qdq.conftest import branches, quantized, relative

WEIGHT_ONLY = {
    "i4_32": "i4[1,32]", "u4_32": "u4[1,32]", "u4_64_ragged": "u4[1,64]", "i4_row": "i4[1,-1]", "u4_tensor": "u4[-1]",
    "i4_rows8": "i4[8,32]", "i3": "i3[1,32]", "u2": "u2[1,32]", "i2_16": "i2[1,16]", "i1": "i1[1,32]",
    "i8_row": "i8[1,-1]", "u8_64": "u8[1,64]", "i5_48": "i5[1,48]",
}  # fmt: skip
INTEGER = {
    "token": ("i8[1,-1]", "i8[1,-1]dynamic"), "static": ("u8[1,-1]", "u8[-1]"), "static_signed": ("i8[1,-1]", "i8[-1]"),
    "w4a8": ("i4[1,-1]", "i8[1,-1]dynamic"), "w7a8": ("i7[1,-1]", "i8[1,-1]dynamic"), "u7a8": ("u7[1,-1]", "u8[-1]"),
    "w4a4": ("i4[1,-1]", "i4[1,-1]dynamic"), "static_4": ("i8[-1]", "u4[-1]"),
    "static_i4": ("u4[1,-1]", "i4[-1]"),
}  # fmt: skip
EMULATED = {
    "groups_token": ("i4[1,32]", "i8[1,-1]dynamic"), "asymmetric_token": ("i8[1,-1]", "u8[1,-1]dynamic"),
    "groups_static": ("u4[1,32]", "u8[-1]"), "tensor_dynamic": ("i8[1,-1]", "i8[-1]dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("level", [1, 4])
def test_weight_only_encodings_are_fused_and_exact(level):
    gm = branches({name: (text, None) for name, text in WEIGHT_ONLY.items()})
    notes = []
    executable = OnnxQdq(accuracy_level=level, threads=1).lower(gm, [torch.randn(2, 5, 96)], notes)
    report = executable.report()
    assert report["operators"]["MatMulNBits"] == len(WEIGHT_ONLY)
    assert report["probe_difference_exact"] < 1e-6
    assert report["probe_difference"] < (1e-6 if level == 1 else 2e-2)
    assert any("3-bit weights are stored in 4-bit containers" in note for note in notes)
    x = torch.randn(1, 1, 96)
    for ours, oracle in zip(executable(x), gm(x), strict=True):
        assert relative(ours, oracle) < (1e-6 if level == 1 else 3e-2)


@pytest.mark.parametrize("signed", [True, False])
def test_integer_and_emulated_encodings_are_fused_and_exact(signed):
    gm = branches(INTEGER | EMULATED)
    notes = []
    executable = OnnxQdq(accuracy_level=1, signed=signed, threads=1).lower(gm, [torch.randn(2, 5, 96)], notes)
    operators = executable.report()["operators"]
    assert operators["MatMulIntegerToFloat"] == len(INTEGER)
    assert operators["MatMulNBits"] == len(EMULATED)
    assert executable.report()["probe_difference_exact"] < 1e-5
    assert any("no integer kernel" in note for note in notes)


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_codes_do_not_saturate(signed):
    gm = branches({"wide": ("i8[1,-1]", "i8[1,-1]dynamic"), "narrow": ("i7[1,-1]", "i8[1,-1]dynamic")}, columns=256, rows=32)
    for name, codes in gm.named_buffers():
        if name.endswith("codes"):
            greatest = 127 if "wide" in name else 63
            codes.copy_(torch.where(torch.arange(32)[:, None] % 2 == 0, -greatest - 1, greatest))
    executable = OnnxQdq(signed=signed, threads=1).lower(gm, [torch.ones(2, 3, 256)], [])
    x = torch.ones(1, 4, 256)
    assert max(relative(ours, oracle) for ours, oracle in zip(executable(x), gm(x), strict=True)) < 1e-5


@pytest.mark.parametrize("rows", [63, 66])
def test_two_bit_weights_that_onnx_runtime_packs_wrongly_get_wider_containers(rows):
    assert stored_width(BLOCKED, Encoding.parse("u2[1,32]"), rows, 32) == 4
    gm = branches({"u2": ("u2[1,32]", None)}, rows=rows)
    executable = OnnxQdq(accuracy_level=1, threads=1).lower(gm, [torch.randn(2, 5, 96)], [])
    assert executable.report()["probe_difference_exact"] < 1e-6


@pytest.mark.parametrize(
    ("text", "size", "ragged", "block"),
    [
        ("i4[1,32]", 96, True, 32), ("i4[1,-1]", 96, True, 128), ("i4[1,-1]", 40, True, 64), ("i4[1,48]", 96, True, 16),
        ("i4[1,512]", 4096, True, 256), ("i4[1,24]", 96, True, None), ("i8[1,-1]", 96, False, 32), ("i8[1,-1]", 100, False, None),
    ],
)  # fmt: skip
def test_blocks_are_powers_of_two_that_divide_groups(text, size, ragged, block):
    assert block_size(Encoding.parse(text), size, ragged=ragged) == block


@pytest.mark.parametrize(
    ("operator", "weight", "activation", "reason"),
    [
        ("Linear", "f8e4m3[1,-1]", None, "no f8e4m3"),
        ("Linear", "i4[1,24]", None, "groups of 32, 64 or 128"),
        ("Linear", "i8[1,-1]", "f8e4m3[1,-1]dynamic", "no f8e4m3"),
        ("Linear", "i8[1,-1]", "i8[1,32]dynamic", "per token"),
        ("Linear", "i8[1,-1]", "i8[1,-1]", "add dynamic"),
        ("Embedding", "i8[1,-1]", "i8[-1]", "indices"),
        ("Conv1d", "i8[1,-1]", None, "quantize linear and embedding only"),
    ],
)
def test_what_has_no_form_is_refused_with_a_sentence(operator, weight, activation, reason):
    encodings = {"weight": Encoding.parse(weight)} | ({"input": Encoding.parse(activation)} if activation else {})
    answer = OnnxQdq().supports(operator, encodings, (64, 96))
    assert answer is not None
    assert reason in answer


@pytest.mark.parametrize("pair", [(text, None) for text in WEIGHT_ONLY.values()] + list((INTEGER | EMULATED).values()))
def test_what_has_a_form_is_supported(pair):
    encodings = {"weight": Encoding.parse(pair[0])} | ({"input": Encoding.parse(pair[1])} if pair[1] else {})
    assert OnnxQdq().supports("Linear", encodings, (64, 96)) is None


def test_a_graph_with_a_refused_site_names_the_module():
    gm = branches({"odd": ("i4[1,24]", None)})
    with pytest.raises(BackendError, match=r"linears\.odd"):
        OnnxQdq().lower(gm, [torch.randn(2, 5, 96)], [])


class Rotated(torch.nn.Module):
    """A Hadamard transform that is an output, and read by two linears."""

    def __init__(self, columns, block):
        super().__init__()
        self.block = block
        self.token, self.groups = (torch.nn.Linear(columns, 64) for _ in range(2))

    def forward(self, x):
        y = torch.ops.fxpress.hadamard(x.relu(), self.block)
        return y, self.token(y), self.groups(y)


@pytest.mark.parametrize(("columns", "block", "products"), [(704, 704, 2), (96, 32, 1), (704, 352, 2), (512, 256, 2)])
def test_online_hadamards_are_kronecker_products(columns, block, products):
    torch.manual_seed(0)
    gm = capture(Rotated(columns, block), args=(torch.randn(2, 3, columns),))
    quantized(gm, {"token": ("i4[1,-1]", "i8[1,-1]dynamic"), "groups": ("i4[1,32]", None)})
    executable = OnnxQdq(accuracy_level=1, threads=1).lower(gm, [torch.randn(2, 5, columns)], [])
    operators = executable.report()["operators"]
    assert (operators["MatMul"], operators["Reshape"]) == (products, 2)
    assert (operators["MatMulIntegerToFloat"], operators["MatMulNBits"]) == (1, 1)
    assert {"Shape", "Concat", "Transpose"}.isdisjoint(operators)
    for batch, length in ((1, 1), (3, 7)):
        x = torch.randn(batch, length, columns)
        assert max(relative(ours, oracle) for ours, oracle in zip(executable(x), gm(x), strict=True)) < 1e-5
