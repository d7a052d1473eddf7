"""Linears with rounded weights: as a graph has them, as modules, and as the tensors of a compressed checkpoint.

pack-quantized  weight_packed int32 [N, ⌈K·b/32⌉], weight_scale [N, G], weight_shape [2], weight_zero_point int32 [⌈N·b/32⌉, G]
other formats   weight int8 or float8 [N, K], weight_scale [N, G], weight_zero_point int8 [N, G]
static inputs   input_scale [1], input_zero_point int8 [1]
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backends.hf.schema import PACKED, Arguments, Scheme
from ir import edit, numerics
from ir.deferred import Deferred
from ir.encoding import Encoding
from ir.errors import BackendError, DataError
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE
from ir.sites import Layer, layers

CODES = 1 << 22  # packed at once: each takes up to 16 bytes on the way


class Rounded(nn.Module):
    """A linear with a rounded weight, which computes as the graph does.

    What is stored otherwise than it was given is made anew each time that it is read, so that many linears take no memory of their own.

    Args:
        scheme: how weight and input are rounded, and stored.
        codes: of the weight, `[N, K]`.
        scale: of the weight, `[N, G]`, one for each of `G` groups of a channel.
        zero_point: likewise; None if there are none. A scheme without zero points stores `q − z`.
        input_scale: of a static input, `[1]`; None if it is dynamic, or not rounded.
        input_zero_point: of a static asymmetric input, `[1]`.
        dtype: in which scales are stored; their own if there is none.
        given: the encoding of codes and zero points; the scheme's own if there is none.
    """

    def __init__(
        self,
        scheme: Scheme,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        dtype: torch.dtype | None = None,
        given: Encoding | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.dtype, self.given = scheme, dtype or scale.dtype, given or scheme.weights.encoding
        self._codes, self._scale, self._zero_point = codes, scale, zero_point
        self.input_scale, self.input_zero_point = input_scale, input_zero_point
        self.bias: nn.Parameter | None = None  # that of the linear whose place it takes

    @property
    def stored(self) -> Tensor:
        """The codes as they were given."""
        return self._codes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, `[N, K]`."""
        return tuple(self._codes.shape)

    @property
    def codes(self) -> Tensor:
        """Of the weight, as the scheme means them, `[N, K]`."""
        if self._zero_point is None or not self.scheme.weights.symmetric:
            return self._codes
        return (self._codes.to(torch.int16) - numerics.expand(self._zero_point.to(torch.int16), self.given, self.shape)).to(torch.int8)

    @property
    def scale(self) -> Tensor:
        """Of the weight, `[N, G]`."""
        return self._scale.to(self.dtype)

    @property
    def zero_point(self) -> Tensor | None:
        """Of the weight, `[N, G]`; None if the scheme has none."""
        return None if self.scheme.weights.symmetric else self._zero_point

    def forward(self, x: Tensor) -> Tensor:
        """`Q(x) Ŵᵀ + b`."""
        given = self.scheme.input_activations
        weight = DEQUANTIZE(self.codes, self.scale, self.zero_point, str(self.scheme.weights.encoding), x.dtype)
        return nn.functional.linear(x if given is None else self._rounded(x, given), weight, self.bias)

    def _rounded(self, x: Tensor, given: Arguments) -> Tensor:
        text, scale, zero_point = str(given.encoding), self.input_scale, self.input_zero_point
        if scale is None:
            scale, chosen = CHOOSE_QPARAMS(x, text)
            zero_point = None if given.symmetric else chosen
        return DEQUANTIZE(QUANTIZE(x, scale, zero_point, text), scale, zero_point, text, x.dtype)  # type: ignore[no-any-return]

    def tensors(self) -> Iterator[tuple[str, Deferred]]:
        """What a checkpoint stores, by the names that it has there, made when it is written."""
        weights, given, zero_point = self.scheme.weights, self.scheme.input_activations, self.zero_point
        (rows, columns), bits = self.shape, weights.num_bits
        yield "weight_scale", Deferred(self.dtype, tuple(self._scale.shape), lambda: self.scale)
        if self.scheme.format == PACKED:
            yield "weight_packed", Deferred(torch.int32, (rows, -(-columns * bits // 32)), lambda: _packed(self.codes, weights.encoding))
            yield "weight_shape", Deferred.of(torch.tensor(self.shape))
            if zero_point is not None:
                words = (-(-rows * bits // 32), zero_point.shape[1])
                yield "weight_zero_point", Deferred(torch.int32, words, lambda: _packed(zero_point.T, weights.encoding).T)
        else:
            dtype = numerics.storage_dtype(weights.encoding) if weights.symmetric else torch.int8
            yield "weight", Deferred(dtype, self.shape, lambda: _signed(self.codes, weights))
            if zero_point is not None:
                yield "weight_zero_point", Deferred(torch.int8, tuple(zero_point.shape), lambda: _signed(zero_point, weights))
        if self.input_scale is not None:
            yield "input_scale", Deferred.of(self.input_scale)
        if given is not None and self.input_zero_point is not None:
            yield "input_zero_point", Deferred.of(_signed(self.input_zero_point, given))

    @classmethod
    def read(cls, scheme: Scheme, stored: Mapping[str, Tensor]) -> "Rounded":
        """The exact inverse of `tensors`.

        Raises:
            DataError: a tensor is missing, or has not the shape that the scheme says.
        """
        weights, given = scheme.weights, scheme.input_activations
        zero_point = stored.get("weight_zero_point")
        try:
            if scheme.format == PACKED:
                rows, columns = stored["weight_shape"].tolist()
                if (rows, -(-columns * weights.num_bits // 32)) != tuple(stored["weight_packed"].shape):
                    raise ValueError(f"{rows} × {columns} weights are not {list(stored['weight_packed'].shape)} words")
                codes = _unpacked(stored["weight_packed"], weights.encoding, columns)
                zero_point = None if zero_point is None else _unpacked(zero_point.T.contiguous(), weights.encoding, rows).T.contiguous()
            else:
                codes = _unsigned(stored["weight"], weights)
                zero_point = None if zero_point is None else _unsigned(zero_point, weights)
            input_zero_point = stored.get("input_zero_point")
            if given is not None and input_zero_point is not None:
                input_zero_point = _unsigned(input_zero_point, given)
            made = cls(scheme, codes, stored["weight_scale"], zero_point, stored.get("input_scale"), input_zero_point)
            wanted = weights.encoding.scale_shape(tuple(codes.shape))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"the tensors of a compressed linear do not fit one another: {error}") from error
        shapes = [made.scale.shape] + ([] if weights.symmetric else [() if zero_point is None else zero_point.shape])
        if any(shape != wanted for shape in shapes):
            raise DataError(f"scales or zero points of a compressed linear have not the shape {list(wanted)}")
        return made


def _packed(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes as a stream of bits along the last axis, least significant first, in whole int32 words."""
    streams = torch.cat([numerics.pack(rows, encoding) for rows in torch.split(codes, _rows(codes.shape[-1]))])
    return nn.functional.pad(streams, (0, -streams.shape[-1] % 4)).view(torch.int32)


def _rows(columns: int) -> int:
    return max(1, CODES // max(1, columns))


def _unpacked(packed: Tensor, encoding: Encoding, size: int) -> Tensor:
    return torch.cat([numerics.unpack(rows.view(torch.uint8), encoding, size) for rows in torch.split(packed, _rows(size))])


def _signed(codes: Tensor, arguments: Arguments) -> Tensor:
    return codes if arguments.symmetric else (codes.to(torch.int16) - 2 ** (arguments.num_bits - 1)).to(torch.int8)


def _unsigned(codes: Tensor, arguments: Arguments) -> Tensor:
    return codes if arguments.symmetric else (codes.to(torch.int16) + 2 ** (arguments.num_bits - 1)).to(torch.uint8)


def rounded_linears(gm: GraphModule, dtype: torch.dtype) -> dict[str, Rounded]:
    """The quantized linears of a graph, by the names of their modules, with scales in the model's dtype, as checkpoints have them.

    Raises:
        BackendError: a module has two weights, or its input is rounded otherwise than by operators before it.
    """
    found: dict[str, Rounded] = {}
    for layer in layers(gm):
        if layer.weight.target is not DEQUANTIZE:
            continue
        name, call = layer.path.partition("#")[::2]
        made = _of_layer(gm, layer, dtype)
        if call and (name not in found or not torch.equal(found[name].codes, made.codes)):
            remedy = "leave out passes that split linears (split_channels, learn_masks), or use backend='onnx'"
            raise BackendError(f"{name} has become several linears", where="backend hf", remedy=remedy)
        found[name] = made
    return found


def _of_layer(gm: GraphModule, layer: Layer, dtype: torch.dtype) -> Rounded:
    x, weight, given = layer.site("input").operand, layer.site("weight").rounded, layer.site("input").rounded
    codes, scale, zero_point = (_constant(gm, operand) for operand in layer.weight.args[:3])
    assert weight is not None and codes is not None and scale is not None
    # What is chosen at run time is no constant.
    input_scale, input_zero_point = (None, None) if given is None else (_constant(gm, operand) for operand in x.args[1:3])
    scheme = Scheme.of(weight, given, tuple(codes.shape))
    if input_scale is not None:
        input_scale = input_scale.reshape(1).to(dtype)
    if input_zero_point is not None:
        input_zero_point = input_zero_point.reshape(1)
    return Rounded(scheme, codes, scale, zero_point, input_scale, input_zero_point, dtype, weight)


def _constant(gm: GraphModule, operand: object) -> Tensor | None:
    """The stored tensor that an operand is; None without one."""
    return edit.attribute(gm, operand).detach() if isinstance(operand, Node) and operand.op == "get_attr" else None


def remarks(linears: Mapping[str, Rounded]) -> list[str]:
    """What users of a checkpoint should know of its linears."""
    taken = {(linear.given.bits, linear.scheme.weights.num_bits if linear.scheme.format == PACKED else 8) for linear in linears.values()}
    found = [f"hf: {bits}-bit weights take {room} bits each" for bits, room in sorted(taken) if bits != room]
    if any(room == 2 for _, room in taken):
        found.append("hf: transformers runs 2-bit weights; whether others do was not tried")
    if any(linear.scheme.format == PACKED and not linear.scheme.weights.symmetric for linear in linears.values()):
        found.append("hf: packed zero points load with compressed-tensors 0.17; 0.18 to 0.20 refuse them (symmetric=True helps)")
    return found
