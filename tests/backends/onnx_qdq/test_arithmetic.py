"""What `ir.numerics` and `ir.packing` compute, computed by ONNX Runtime; and whole decoders with a cache of codes."""

import math

import onnx
import pytest
import torch

import passes
from backends.onnx_qdq import OnnxQdq
from ir.cache_code import CacheCode, compute
from ir.capture import capture
from ir.encoding import Encoding
from passes.probe import relative_error
from tests.families import VOCABULARY, load
from tests.passes.samples import CALIBRATION, tokens

TEXTS = [
    *(f"{letter}{bits}[1,-1]dynamic" for letter in "iu" for bits in (8, 7, 4, 3, 2)),
    *("u4[1,8]dynamic", "i2[1,16]dynamic", "u8[-1,1,-1,-1]", "i8[-1]", "i4[-1,1,-1,-1]", "u2[-1,1,-1,1]"),
]


class Coded(torch.nn.Module):
    """What every encoding keeps of `x`, and the floats it stands for."""

    def __init__(self):
        super().__init__()
        self.codes = []
        for index, text in enumerate(TEXTS):
            encoding = Encoding.parse(text)
            scale = zero_point = None
            if not encoding.dynamic:
                shape = encoding.scale_shape((1, 2, 1, 16))
                scale = torch.linspace(0.3, 5, math.prod(shape)).reshape(shape)
                self.register_buffer(f"scale_{index}", scale)
                if not encoding.symmetric:
                    zero_point = torch.ones_like(scale, dtype=torch.uint8)
                    self.register_buffer(f"zero_point_{index}", zero_point)
            self.codes.append(CacheCode(encoding, scale, zero_point))

    def forward(self, x):
        results, x = [], x.unflatten(-1, (2, 16)).transpose(1, 2)
        for code in self.codes:
            kept = code.encode(x, compute)
            results += [*kept.values(), code.decode(kept, torch.float32, compute)]
        return tuple(results)


def test_every_encoding_of_a_cache_is_bit_exact():
    def sample(*shape):
        return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0)) * 10

    model = Coded()
    gm = capture(model, args=(sample(3, 5),))
    executable = OnnxQdq(threads=1).lower(gm, [sample(3, 5)], [])
    for shape in ((1, 1), (4, 7)):
        found, expected = executable(sample(*shape)), model(sample(*shape))
        assert len(found) == len(expected)
        for ours, oracle in zip(found, expected, strict=True):
            assert ours.dtype == oracle.dtype
            assert torch.equal(ours, oracle)


# Text of the pass, family: each width, dynamic and static, with zero points and without, on both.
CASES = [
    ("quantize_cache(keys=8, values=4)", "llama"),
    ("quantize_cache(keys=4, values=2, symmetric=True, dynamic=False)", "llama"),
    pytest.param(("quantize_cache(keys=2, values=8, dynamic=False)", "gpt2"), marks=pytest.mark.thorough),
    ("quantize_cache(keys=4, values=2, channels=True)", "llama_tied"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[1]}, {case[0]}")
def exported(request, tmp_path_factory):
    """A compiled model, the same from its folder, and the folder."""
    text, family = request.param
    backend = OnnxQdq(accuracy_level=1, threads=1)
    made = passes.compile(load(family).captured, f"canonicalize, {text}", CALIBRATION, backend)
    folder = made.save(tmp_path_factory.mktemp("out") / "model")
    return made, passes.load(folder), folder


def followed(made, executable, batch, padding=0):
    """Prefill and two steps, both fed with the oracle's cache: error of the logits, and how many codes differ, step by step."""
    signature, past, mask = made.signature, None, torch.ones(batch, 7, dtype=torch.int64)
    mask[-1, :padding] = 0
    for seed, length in enumerate((7, 1, 1)):
        mask = torch.cat([mask, torch.ones(batch, length, dtype=torch.int64)], 1) if seed else mask
        inputs = signature.bind(input_ids=tokens(batch, length, seed), attention_mask=mask, past_key_values=past)
        with torch.no_grad():
            ours, oracle = executable(*inputs), made.graph(*inputs)
        assert [(y.dtype, y.shape) for y in ours] == [(y.dtype, y.shape) for y in oracle]
        moved = sum(int((a != b).sum()) for a, b, port in zip(ours, oracle, signature.outputs, strict=True) if port in signature.coded)
        yield relative_error(ours[:1], oracle[:1]), moved / sum(y.numel() for y in oracle[1:])
        past = signature.wrap(oracle).past_key_values


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 0), (3, 2)])
def test_prefill_and_decode_equal_the_oracles(exported, batch, padding):
    made, loaded, _ = exported
    for error, moved in followed(made, loaded.executable, batch, padding):
        # A difference of 1e-7 can move a code that lies on a tie; there are none or very few.
        assert error < 1e-4 if not moved else error < 2e-2
        assert moved < 5e-3


def test_the_file_takes_and_gives_codes(exported):
    made, _, folder = exported
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*model.graph.input, *model.graph.output]}
    for port in [*made.signature.inputs, *made.signature.outputs]:
        expected = {"uint8": "UINT8", "int8": "INT8", "float16": "FLOAT16", "float32": "FLOAT", "int64": "INT64"}[port.dtype]
        assert types[port.name] == getattr(onnx.TensorProto, expected)
        if port.name.startswith("p"):
            assert dims[port.name][::2] == ["batch", "total" if port.name.startswith("present") else "past"] or "position" in port.name
    assert not (folder / "genai_config.json").exists()
    assert any("no genai_config.json" in note for note in made.report().notes)


def test_with_8_bit_weights_and_activations_too():
    made = passes.compile(load("llama").captured, "w8a8(cache=4)", backend=OnnxQdq(threads=1))
    operators = made.report().target["operators"]
    assert operators["MatMulIntegerToFloat"] == 14
    past = made(input_ids=tokens(2, 7)).past_key_values
    logits = made(input_ids=tokens(2, 1), past_key_values=past).logits
    assert logits.shape == (2, 1, VOCABULARY)
    assert made.report().target["probe_difference_exact"] < 5e-2


def test_a_model_in_half_precision_keeps_the_same_cache():
    made = passes.compile(load("llama", torch.bfloat16).captured, "canonicalize, quantize_cache(bits=4)", backend=OnnxQdq(threads=1))
    outputs = made.executable(*made.signature.bind(tokens(2, 5)))
    assert {y.dtype for y in outputs[1:]} == {torch.uint8, torch.float16}
