"""Quantization in ONNX arithmetic, as `ir.numerics` and `ir.packing`: scales, codes, several codes to a byte, and floats again."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as onir
import torch
from onnxscript import opset23 as op

from ir.encoding import Encoding
from ir.numerics import TINY, TINY_HALF, code_range, storage_dtype
from ir.packing import container, per_byte

_ONNX_DTYPE = {torch.int8: onir.DataType.INT8, torch.uint8: onir.DataType.UINT8}
HALF_MAX = 65504.0


def number(value: float) -> Any:
    """A float32 constant."""
    return op.Constant(value=onir.tensor(value, dtype=onir.DataType.FLOAT))


def integers(values: Sequence[int]) -> Any:
    """A constant list of sizes or axes."""
    return op.Constant(value=onir.tensor(list(values), dtype=onir.DataType.INT64))


def _byte(value: int) -> Any:
    return op.Constant(value=onir.tensor(value, dtype=onir.DataType.UINT8))


def choose_qparams(x: Any, encoding: str, scale_dtype: int | None = None) -> tuple[Any, Any]:
    """Dynamic scales and zero points in float arithmetic, as `ir.numerics.choose_qparams`."""
    e = Encoding.parse(encoding)
    low, high = code_range(e)
    x, grouped = _split(x, e), _groups(e)
    axes = integers([-1] if len(e.block) > 1 else range(len(x.shape)))
    if e.symmetric:
        scale = op.Div(op.ReduceMax(op.Abs(x), axes, keepdims=not grouped), number((high - low) / 2 / e.clip))
        kept, scale = _kept(scale, scale_dtype)
        return kept, op.Cast(op.Sub(scale, scale), to=onir.DataType.UINT8)
    zero = number(0.0)
    least = op.Min(op.ReduceMin(x, axes, keepdims=not grouped), zero)
    greatest = op.Max(op.ReduceMax(x, axes, keepdims=not grouped), zero)
    if e.clip != 1:
        least, greatest = (op.Mul(extreme, number(e.clip)) for extreme in (least, greatest))
    kept, scale = _kept(op.Div(op.Sub(greatest, least), number(float(high - low))), scale_dtype)
    offset = op.Clip(op.Round(op.Div(op.Neg(least), scale)), number(float(low)), number(float(high)))
    return kept, op.Cast(offset, to=onir.DataType.UINT8)


def _kept(scale: Any, dtype: int | None) -> tuple[Any, Any]:
    """A scale kept away from zero as it is stored, and the same in float32."""
    if dtype != onir.DataType.FLOAT16:
        bounded = op.Max(scale, number(TINY))
        return bounded, bounded
    half = op.Cast(op.Clip(scale, number(TINY_HALF), number(HALF_MAX)), to=onir.DataType.FLOAT16)
    return half, op.Cast(half, to=onir.DataType.FLOAT)


def quantize(x: Any, scale: Any, zero_point: Any, encoding: str) -> Any:
    """Codes in float arithmetic: no QuantizeLinear, which next to a blocked weight ONNX Runtime fuses wrongly."""
    e = Encoding.parse(encoding)
    low, high = code_range(e)
    codes = op.Round(op.Div(_split(x, e), _spread(scale, e)))
    if not e.symmetric and zero_point is not None:
        codes = op.Add(codes, _spread(zero_point, e))
    codes = op.Cast(op.Clip(codes, number(float(low)), number(float(high))), to=_ONNX_DTYPE[storage_dtype(e)])
    return _join(codes, x, e)


def dequantize(codes: Any, scale: Any, zero_point: Any, encoding: str, dtype: int) -> Any:
    """(q − z) · s in float arithmetic."""
    e = Encoding.parse(encoding)
    numbers = op.Cast(_split(codes, e), to=onir.DataType.FLOAT)
    if zero_point is not None and not e.symmetric:
        numbers = op.Sub(numbers, _spread(zero_point, e))
    return _join(op.Mul(numbers, _spread(scale, e)), codes, e)


def pack(codes: Any, encoding: str) -> Any:
    """Planes of codes in the bits of bytes."""
    e = Encoding.parse(encoding)
    least = code_range(e)[0]
    if least:
        codes = op.Sub(codes, op.Constant(value=onir.tensor(least, dtype=onir.DataType.INT8)))
    planes = op.Split(op.Cast(codes, to=onir.DataType.UINT8), axis=-1, num_outputs=per_byte(e))
    packed = planes[0]
    for index, plane in enumerate(planes[1:], 1):
        packed = op.BitwiseOr(packed, op.BitShift(plane, _byte(index * container(e)), direction="LEFT"))
    return packed


def unpack(packed: Any, encoding: str) -> Any:
    """The codes of packed bytes."""
    e = Encoding.parse(encoding)
    width, count, least = container(e), per_byte(e), code_range(e)[0]
    planes = [packed if index == 0 else op.BitShift(packed, _byte(index * width), direction="RIGHT") for index in range(count)]
    masked = [op.BitwiseAnd(plane, _byte(2**width - 1)) for plane in planes[:-1]]
    codes = op.Concat(*masked, planes[-1], axis=-1)
    if not least:
        return codes
    return op.Add(op.Cast(codes, to=onir.DataType.INT8), op.Constant(value=onir.tensor(least, dtype=onir.DataType.INT8)))


def _groups(e: Encoding) -> bool:
    """Whether several scales lie along the last axis, each for a run of elements."""
    return len(e.block) > 1 and e.block[-1] > 1


def _split(x: Any, e: Encoding) -> Any:
    """`x` with the last axis split into groups; sizes that vary are copied."""
    if not _groups(e):
        return x
    group = e.block[-1]
    return op.Reshape(x, integers([*[0] * (len(x.shape) - 1), x.shape[-1] // group, group]))


def _join(y: Any, x: Any, e: Encoding) -> Any:
    """`y` with its groups joined again, in the shape of `x`."""
    return op.Reshape(y, integers([*[0] * (len(x.shape) - 1), x.shape[-1]])) if _groups(e) else y


def _spread(values: Any, e: Encoding) -> Any:
    """Scales or zero points as floats that broadcast against `_split(x)`."""
    values = op.Cast(values, to=onir.DataType.FLOAT)
    return op.Unsqueeze(values, integers([-1])) if _groups(e) else values
