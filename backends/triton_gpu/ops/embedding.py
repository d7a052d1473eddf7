"""Rows of a packed table.

    fxpress::packed_embedding(indices, planes, scale, zero?, bits, group, offset, columns, dtype) -> x

The body is the same on every device: rows of codes are gathered from the planes, and only what was gathered is unpacked. So an embedding
reads the planes of a head that is tied to it, in either container.
"""

import torch
from torch import Tensor

from backends.triton_gpu import layout
from backends.triton_gpu.ops.linear import weight_values


@torch.library.custom_op("fxpress::packed_embedding", mutates_args=())
def packed_embedding(
    indices: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """`W[indices]`.

    Args:
        indices: of rows, any shape.
        planes: of the table, in containers of 8 or 16 bits.
        columns: K, the width of a row.
        dtype: of the result.

    The other arguments are those of `packed_linear`.

    Returns:
        `[*indices.shape, K]`.
    """
    rows = indices.reshape(-1)
    z = None if zero is None else zero.index_select(1, rows)
    W = weight_values(layout.taken(planes, rows), scale.index_select(1, rows), z, bits, group, offset, columns)
    return W.to(dtype).reshape(*indices.shape, columns)


@packed_embedding.register_fake
def _(
    indices: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    offset: float,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty([*indices.shape, columns], dtype=dtype)


PACKED_EMBEDDING = torch.ops.fxpress.packed_embedding.default
