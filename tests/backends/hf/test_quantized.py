import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from backends.hf.quantized import Rounded, remarks, rounded_linears
from backends.hf.schema import Scheme
from ir import edit
from ir.encoding import Encoding
from ir.errors import BackendError, DataError
from ir.numerics import choose_qparams, quantize
from ir.ops import DEQUANTIZE
from ir.sites import layers
from tests.families import load
from tests.passes.samples import CALIBRATION, compiled, run

SHAPE = (36, 96)


def rounded(weight, given=None):
    """A linear whose weight is kept as it was rounded."""
    encoding = Encoding.parse(weight)
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(W, encoding)
    scheme = Scheme.of(encoding, None if given is None else Encoding.parse(given), SHAPE)
    return Rounded(scheme, quantize(W, qparams, encoding), qparams.scale, qparams.zero_point)


def made(linear):
    """What is stored of a linear, each tensor as it was announced."""
    tensors = {name: tensor.make() for name, tensor in linear.tensors()}
    announced = {name: (tensor.dtype, tensor.shape) for name, tensor in linear.tensors()}
    assert announced == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return tensors


def values(linear):
    return DEQUANTIZE(linear.codes, linear.scale, linear.zero_point, str(linear.scheme.weights.encoding), torch.float32)


@pytest.mark.parametrize("given", [None, "i8[1,-1]dynamic"])
@pytest.mark.parametrize("weight", ["i2[1,-1]", "u2[1,32]", "i4[1,32]", "u4[1,-1]", "u8[1,16]", "i8[1,-1]"])
def test_compressed_tensors_decodes_what_is_stored_and_so_do_we(weight, given):
    linear = rounded(weight, given)
    stored = made(linear)
    scheme = QuantizationScheme.model_validate({**linear.scheme.model_dump(), "targets": ["Linear"]})
    decoded = BaseCompressor.get_value_from_registry(linear.scheme.format).decompress(stored, scheme)["weight"]
    assert torch.equal(decoded, values(linear))
    again = Rounded.read(linear.scheme, stored)
    assert torch.equal(again.codes, linear.codes) and again.codes.dtype == linear.codes.dtype
    assert torch.equal(values(again), values(linear))


def test_floats_are_stored_as_they_are():
    linear = rounded("f8e4m3[1,-1]")
    stored = made(linear)
    assert stored["weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(values(Rounded.read(linear.scheme, stored)), values(linear))


@pytest.mark.parametrize(("lost", "said"), [("weight_packed", "weight_packed"), ("weight_zero_point", "shape"), ("weight_scale", "scale")])
def test_tensors_that_do_not_fit_are_refused(lost, said):
    linear = rounded("u4[1,32]")
    with pytest.raises(DataError, match=said):
        Rounded.read(linear.scheme, {name: tensor for name, tensor in made(linear).items() if name != lost})


@pytest.mark.parametrize(("bits", "room"), [(1, 2), (3, 4), (6, 8)])
def test_widths_without_a_container_of_their_own_keep_their_values(bits, room):
    gm = load("llama").graph()
    run(gm, f"canonicalize, annotate(scheme='W{bits}A16', symmetric={bits == 1}), round_weights(method='nearest')")
    linears = rounded_linears(gm, torch.float32)
    name, linear = next(iter(linears.items()))
    node = next(layer.weight for layer in layers(gm) if layer.path == name)
    tensors = [None if read is None else edit.attribute(gm, read) for read in node.args[:3]]
    assert torch.equal(values(linear), DEQUANTIZE(*tensors, *node.args[3:]))
    assert linear.zero_point is None
    assert remarks(linears)[0] == f"hf: {bits}-bit weights take {room} bits each"


def test_static_inputs_come_along():
    linear = rounded_linears(compiled("llama", "w8a8(dynamic=False)").graph, torch.float32)["model.layers.1.mlp.down_proj"]
    stored = made(linear)
    assert (stored["input_scale"].shape, stored["input_zero_point"].dtype) == ((1,), torch.int8)
    again = Rounded.read(linear.scheme, stored)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), linear(x))
    assert not torch.equal(linear(x), x @ values(linear).T)


def test_a_linear_in_parts_is_refused():
    gm = load("llama").graph()
    pipeline = "canonicalize, annotate(scheme='W4A16'), split_channels(high='W8A16', by='activation'), round_weights(method='nearest')"
    run(gm, pipeline, CALIBRATION)
    with pytest.raises(BackendError, match="has become several linears"):
        rounded_linears(gm, torch.float32)
