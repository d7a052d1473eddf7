"""Linears with packed weights: of floating-point activations, and of int8 ones.

    fxpress::packed_linear(x, planes, scale, zero?, bias?, bits, group, offset) -> y
    fxpress::packed_linear_int8(codes, input_scale, input_zero?, planes, scale, zero?, bias?, bits, group, offset, dtype) -> y

A weight is `W[n, k] = scale[g, n] · (u[n, k] − z[g, n])` with `g = k // group`, unsigned codes `u` in the planes of
`backends.triton_gpu.layout`, and `z` the tensor `zero`, or `offset` everywhere. Symmetric codes of b bits have the offset `2^(b−1)`; a
sign (one bit) has `offset = 0.5` and twice its scale.
"""

import torch
from torch import Tensor

from backends.triton_gpu import layout


def weight_values(planes: list[Tensor], scale: Tensor, zero: Tensor | None, bits: int, group: int, offset: float, columns: int) -> Tensor:
    """`(u − z)`'s and scales' product `[N, K]`, float32, of `columns` = K."""
    return factors(planes, zero, bits, group, offset, columns) * of_columns(scale, group, columns)


def factors(planes: list[Tensor], zero: Tensor | None, bits: int, group: int, offset: float, columns: int) -> Tensor:
    """`u − z`, `[N, K]`, float32, exact."""
    z = offset if zero is None else of_columns(zero, group, columns)
    return layout.unpack(planes, bits, columns).float() - z


def of_columns(values: Tensor, group: int, columns: int) -> Tensor:
    """What `[K / group, N]` says of every weight: `[N, K]`, float32."""
    return values.float().repeat_interleave(group, 0)[:columns].T


@torch.library.custom_op("fxpress::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor, planes: list[Tensor], scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int, offset: float
) -> Tensor:
    """`x W^T + bias`.

    Args:
        x: `[..., K]`, float16, bfloat16 or float32.
        planes: of the weight, in containers of 16 bits.
        scale: `[ceil(K / group), N]`, any floating dtype.
        zero: zero points like `scale`, uint8; None where `offset` says them all.
        bias: `[N]`.
        bits: 1 to 8, of the weight's codes.
        group: how many consecutive `k` share a scale; K or more if all do.

    Returns:
        `[..., N]` in the dtype of `x`.
    """
    W = weight_values(planes, scale, zero, bits, group, offset, x.shape[-1])
    y = x.float() @ W.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@packed_linear.register_fake
def _(
    x: Tensor, planes: list[Tensor], scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int, offset: float
) -> Tensor:
    return x.new_empty([*x.shape[:-1], scale.shape[1]])


@packed_linear.register_kernel("cuda")
def _(
    x: Tensor, planes: list[Tensor], scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, group: int, offset: float
) -> Tensor:
    from backends.triton_gpu.kernels import weight_only

    return weight_only.linear(x, planes, scale, zero, bias, bits, group, offset)


@torch.library.custom_op("fxpress::packed_linear_int8", mutates_args=(), device_types="cpu")
def packed_linear_int8(
    codes: Tensor,
    input_scale: Tensor,
    input_zero: Tensor | None,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    dtype: torch.dtype,
) -> Tensor:
    """`x W^T + bias` for `x = input_scale · (codes − input_zero)`: products of integers, summed exactly within a group.

    Args:
        codes: `[..., K]`, int8; codes of fewer bits too.
        input_scale: one a token, `[..., 1]`, or one in all, of one element; floating.
        input_zero: zero points like `input_scale`, in the range of int8; None if zero.
        planes: of the weight, in containers of 8 bits.
        dtype: of the result.

    The other arguments are those of `packed_linear`.

    Returns:
        `[..., N]`.
    """
    K = codes.shape[-1]
    q = codes.double() if input_zero is None else codes.double() - input_zero.double()
    u = factors(planes, zero, bits, group, offset, K).double()
    y = torch.zeros(*codes.shape[:-1], scale.shape[1], dtype=torch.float64, device=codes.device)
    for index, of_group in enumerate(scale.double()):
        part = slice(index * group, (index + 1) * group)
        y += (q[..., part] @ u[:, part].T) * of_group
    y = (y * input_scale.double()).to(torch.float32)
    return (y if bias is None else y + bias.float()).to(dtype)


@packed_linear_int8.register_fake
def _(
    codes: Tensor,
    input_scale: Tensor,
    input_zero: Tensor | None,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], scale.shape[1]], dtype=dtype)


@packed_linear_int8.register_kernel("cuda")
def _(
    codes: Tensor,
    input_scale: Tensor,
    input_zero: Tensor | None,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    dtype: torch.dtype,
) -> Tensor:
    from backends.triton_gpu.kernels import int8

    return int8.packed_linear_int8(codes, input_scale, input_zero, planes, scale, zero, bias, bits, group, offset, dtype)


PACKED_LINEAR = torch.ops.fxpress.packed_linear.default
PACKED_LINEAR_INT8 = torch.ops.fxpress.packed_linear_int8.default
