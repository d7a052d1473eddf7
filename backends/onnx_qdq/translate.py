"""Write a legalized graph as an ONNX model."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as onir
import torch
from onnxscript import opset23 as op
from onnxscript import values
from torch import Tensor
from torch.fx import GraphModule

from backends.onnx_qdq import arithmetic
from backends.onnx_qdq.arithmetic import integers, number
from backends.onnx_qdq.legalize import SITE
from backends.sites import ATEN, FXPRESS
from ir.errors import BackendError
from ir.hadamard import factors, orders
from ir.numerics import TINY

_TYPES = {"T1": ["tensor(uint8)"], "Tind": ["tensor(int64)", "tensor(int32)"], "T2": ["tensor(float)"]}


def _microsoft(name: str, inputs: Mapping[str, str], attributes: Sequence[str]) -> values.Op:
    """The part that we use of an operator of ONNX Runtime's own, which the onnx package does not know; the last input is optional."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    *required, last = [schema.FormalParameter(given, kind) for given, kind in inputs.items()]
    return values.Op(
        values.Opset("com.microsoft", 1),
        name,
        schema(
            name,
            "com.microsoft",
            1,
            inputs=[*required, schema.FormalParameter(last.name, last.type_str, param_option=optional)],
            outputs=[schema.FormalParameter("output", "T2")],
            type_constraints=[(kind, types, "") for kind, types in _TYPES.items() if kind in inputs.values()],
            attributes=[schema.Attribute(attribute, schema.AttrType.INT, "") for attribute in attributes],
        ),
    )


_GATHER = _microsoft(
    "GatherBlockQuantized",
    {"data": "T1", "indices": "Tind", "scales": "T2", "zero_points": "T1"},
    ("block_size", "bits", "gather_axis", "quantize_axis"),
)
_MATMUL = _microsoft("MatMulNBits", {"A": "T2", "B": "T1", "scales": "T2", "zero_points": "T1"}, ("K", "N", "bits", "block_size"))

_EXPORTER_LOG = logging.getLogger("torch.onnx._internal.exporter._registration")  # complains about packages that we do not need


def to_onnx(gm: GraphModule, example: Sequence[Tensor], opset: int) -> onir.Model:
    """The graph as an unoptimized ONNX model; axes whose recorded sizes are symbolic stay dynamic.

    Raises:
        BackendError: an operator of the graph has no ONNX form.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    shapes = [
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)}
        for node in placeholders
    ]
    _EXPORTER_LOG.setLevel(logging.ERROR)
    table = {target: row for target, row in TRANSLATIONS.items() if opset >= _SINCE.get(target, 0)}
    try:
        with torch.no_grad():
            program = torch.export.export(gm, tuple(example), dynamic_shapes=_by_name(gm, shapes))
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, custom_translation_table=table, optimize=False, verbose=False
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise BackendError(
            f"the graph has no ONNX form: {_cause(error)}",
            remedy="the chained error names the operator; keep the reference backend, or report the operator",
        ) from error
    assert exported is not None
    return exported.model


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _by_name(gm: GraphModule, shapes: Sequence[Any]) -> dict[str, Any]:
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    return dict(zip(names, shapes, strict=True))


def _with_bias(y: Any, bias: Any) -> Any:
    return y if bias is None else op.Add(y, bias)


def _blocked(x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, rows: int, bits: int, block: int) -> Any:
    """x · DQ(codes [K, N]) along axis 0, which ONNX Runtime fuses to MatMulNBits."""
    operands = [codes, scale] if zero_point is None else [codes, scale, zero_point]
    weight = op.DequantizeLinear(*operands, axis=0, block_size=block)
    if bias is None or len(x.shape) != 2:
        return _with_bias(op.MatMul(x, weight), bias)
    # A matrix times a matrix plus a bias becomes Gemm, with a Relu after it FusedGemm, which takes the place of MatMulNBits.
    first = op.Constant(value=onir.tensor([0], dtype=onir.DataType.INT64))
    return op.Squeeze(op.Add(op.MatMul(op.Unsqueeze(x, first), weight), bias), first)


def _integer(x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, step: Any, offset: Any, low: int, high: int, clip: float) -> Any:
    """s · (Q(x / s) · DQ(codes)), fused to MatMulIntegerToFloat. Activation codes are stored unsigned, shifted by 128."""
    shift = 0 if low == 0 else 128
    wide = high - low == 255
    weight = op.DequantizeLinear(codes, scale, zero_point, axis=1)
    zero = offset if offset is not None else op.Constant(value=onir.tensor(shift, dtype=onir.DataType.UINT8))
    if step is not None and wide:
        q = op.QuantizeLinear(x, step, zero)
        return _with_bias(op.MatMul(op.DequantizeLinear(q, step, zero), weight), bias)
    s = _token_step(x, (high - low) / 2 / clip) if step is None else step
    scaled = op.Div(x, s)
    if not wide:
        z = number(0.0) if offset is None else op.Cast(offset, to=onir.DataType.FLOAT)
        scaled = op.Clip(op.Round(scaled), op.Sub(number(float(low)), z), op.Sub(number(float(high)), z))
    one = number(1.0)
    product = op.MatMul(op.DequantizeLinear(op.QuantizeLinear(scaled, one, zero), one, zero), weight)
    return _with_bias(op.Mul(product, s), bias)


def _token_step(x: Any, greatest: float) -> Any:
    """max|x| / greatest over the last axis, kept away from zero.

    The order of operations is the reference's: the greatest |x| lies on a tie, max|x| / s = 127.5, which other orders round differently.
    """
    last = op.Constant(value=onir.tensor([-1], dtype=onir.DataType.INT64))
    return op.Max(op.Div(op.ReduceMax(op.Abs(x), last), number(greatest)), number(TINY))


def _gather(ids: Any, codes: Any, scale: Any, zero_point: Any, columns: int, bits: int, block: int) -> Any:
    """Rows of a quantized table, dequantized after they are picked."""
    operands = [codes, ids, scale] if zero_point is None else [codes, ids, scale, zero_point]
    return _GATHER(*operands, block_size=block, bits=bits, gather_axis=0, quantize_axis=1)


def _shared(x: Any, codes: Any, scale: Any, zero_point: Any, bias: Any, columns: int, bits: int, block: int) -> Any:
    """x · Wᵀ by the table of a gather: its rows, cut into blocks, are what MatMulNBits reads. ONNX Runtime folds the Reshape."""
    rows = codes.shape[0]
    blocks = op.Reshape(codes, integers([rows, columns // block, block * bits // 8]))
    operands = [x, blocks, scale] if zero_point is None else [x, blocks, scale, zero_point]
    return _with_bias(_MATMUL(*operands, K=columns, N=rows, bits=bits, block_size=block), bias)


def _hadamard(x: Any, block: int) -> Any:
    """`A · X · B` over runs of a · b channels with `H = A ⊗ B` (all symmetric), as `ir.hadamard.transform`; sizes that vary are copied."""
    *left, right = [op.Constant(value=onir.tensor(factor.numpy())) for factor in factors(block, torch.float32)]
    sizes, channels = orders(block), x.shape[-1] if isinstance(x.shape[-1], int) else -1
    runs = [channels // block] if channels != block else []  # −1 if the channels vary, too
    kept = [0] * (len(x.shape) - 1)
    y = op.MatMul(op.Reshape(x, op.Constant(value=onir.tensor([*kept, *runs, *sizes], dtype=onir.DataType.INT64))), right)
    y = op.MatMul(left[0], y) if left else y
    return op.Reshape(y, op.Constant(value=onir.tensor([*kept, channels], dtype=onir.DataType.INT64)))


def _rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """RMSNormalization over the last axes, with a gain of ones if there is none."""
    gain = onir.tensor(torch.ones(tuple(normalized_shape)).numpy())
    weight = op.Constant(value=gain) if weight is None else weight
    epsilon = torch.finfo(torch.float32).eps if eps is None else eps
    return op.RMSNormalization(x, weight, axis=-len(normalized_shape), epsilon=epsilon)


TRANSLATIONS: dict[Any, Any] = {
    SITE.blocked.default: _blocked,
    SITE.integer.default: _integer,
    SITE.gather.default: _gather,
    SITE.shared.default: _shared,
    FXPRESS.choose_qparams.default: arithmetic.choose_qparams,
    FXPRESS.quantize.default: arithmetic.quantize,
    FXPRESS.dequantize.default: arithmetic.dequantize,
    FXPRESS.pack.default: arithmetic.pack,
    FXPRESS.unpack.default: arithmetic.unpack,
    FXPRESS.hadamard.default: _hadamard,
    ATEN.rms_norm.default: _rms_norm,
}
"""Operators whose translation is ours: the exporter's own is used for the rest."""

_SINCE = {ATEN.rms_norm.default: 23}  # the opset from which a translation can be used
