"""Graphs with sites of given encodings, and inputs for them."""

import operator
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.onnx._internal.exporter import _registration

from ir import numerics
from ir.capture import capture
from ir.edit import add_attribute, attribute, clean, emit, value
from ir.encoding import Encoding
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from ir.sites import layers


@pytest.fixture(scope="session", autouse=True)
def _registry_made_once() -> Iterator[None]:
    """Torch's exporter parses the source of all its translations on each call, two seconds; here it does so once."""
    original, made = _registration.ONNXRegistry.from_torchlib, {}

    def cached(cls, opset_version):
        if opset_version not in made:
            made[opset_version] = original(opset_version)
        registry = cls()
        registry._opset_version = opset_version
        registry.functions.update({target: list(rows) for target, rows in made[opset_version].functions.items()})
        return registry

    _registration.ONNXRegistry.from_torchlib = classmethod(cached)
    yield
    _registration.ONNXRegistry.from_torchlib = original


class Branches(nn.Module):
    """Independent linears over one input, so that a single export tests many encodings."""

    def __init__(self, names: list[str], columns: int, rows: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleDict({name: nn.Linear(columns, rows, bias=bias) for name in names})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.linears.values())


def branches(encodings: Mapping[str, tuple[str, str | None]], columns: int = 96, rows: int = 64, bias: bool = True) -> GraphModule:
    """One linear per entry of `encodings`: weight and activation."""
    gm = capture(Branches(list(encodings), columns, rows, bias), args=(torch.randn(2, 3, columns),))
    quantized(gm, {f"linears.{name}": pair for name, pair in encodings.items()})
    return gm


def quantized(gm: GraphModule, encodings: Mapping[str, tuple[str, str | None]]) -> int:
    """Quantize the layers whose path is in `encodings`, or whose kind is; how many there were."""
    count = 0
    for layer in layers(gm):
        pair = encodings.get(layer.path, encodings.get(layer.kind))
        if pair is None:
            continue
        count += 1
        weight, name = attribute(gm, layer.weight), str(layer.weight.target)
        encoding = Encoding.parse(pair[0])
        qparams = numerics.choose_qparams(weight.float(), encoding, torch.float16)
        parts = {"codes": numerics.quantize(weight, qparams, encoding), "scale": qparams.scale, "zero_point": qparams.zero_point}
        nodes = [None if t is None else add_attribute(gm, f"{name}_{key}", t, before=layer.node) for key, t in parts.items()]
        layer.site("weight").read(emit(gm, DEQUANTIZE, (*nodes, pair[0], weight.dtype), before=layer.node))
        if pair[1]:
            _round_input(gm, layer, pair[1])
    clean(gm)
    return count


def _round_input(gm, layer, text):
    x, encoding = layer.site("input").operand, Encoding.parse(text)
    if encoding.dynamic:
        chosen = emit(gm, CHOOSE_QPARAMS, (x, text), before=layer.node)
        scale, zero_point = (emit(gm, operator.getitem, (chosen, i), before=layer.node) for i in (0, 1))
        zero_point = None if encoding.symmetric else zero_point
    else:
        qparams = numerics.choose_qparams(torch.tensor([[[-2.5, 3.0]]]), encoding)
        scale = add_attribute(gm, f"{layer.path}.input_scale", qparams.scale, before=layer.node)
        zero_point = qparams.zero_point
        if zero_point is not None:
            zero_point = add_attribute(gm, f"{layer.path}.input_zero_point", zero_point, before=layer.node)
    codes = emit(gm, QUANTIZE, (x, scale, zero_point, text), before=layer.node)
    layer.site("input").read(emit(gm, DEQUANTIZE, (codes, scale, zero_point, text, value(x).dtype), before=layer.node))


def flat_inputs(gm: GraphModule, batch: int, length: int, past: int = 0, seed: int = 1) -> list[Tensor]:
    """Random tokens and a random cache."""
    signature = gm.meta["signature"]
    generator = torch.Generator().manual_seed(seed)
    caches = [port for port in signature.inputs if port.name.startswith("past_key_values.")]
    cache = [torch.randn(batch, p.shape[1], past, p.shape[3], generator=generator).to(p.torch_dtype) for p in caches]
    given = {"past_key_values": list(zip(cache[::2], cache[1::2], strict=True))} if cache else {}
    return signature.bind(input_ids=torch.randint(1, 128, (batch, length), generator=generator), **given)


def relative(ours: Tensor, oracle: Tensor) -> float:
    ours, oracle = ours.detach(), oracle.detach()
    return float((ours.double() - oracle.double()).norm() / oracle.double().norm())
