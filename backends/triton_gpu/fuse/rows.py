"""A rotation or a norm that only the rounding of its result reads becomes one operator with it."""

from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from backends.triton_gpu.ops.rows import HADAMARD_QUANTIZE_ROWS, NORM_QUANTIZE_ROWS, QUANTIZE_ROWS
from ir import edit
from ir.match import aten, find, is_call, operands
from ir.ops import HADAMARD


def fuse_rows(gm: GraphModule) -> int:
    """Fuse what stands before the rounding of activations; the number of operators that became one with another.

    Before: `%n = aten.rms_norm(%x, [K], %w, eps); %q = quantize_rows(%n, encoding)`
    After:  `%q = norm_quantize_rows(%x, %w, eps, encoding)`

    Before: `%h = hadamard(%x, block); %q = quantize_rows(%h, encoding)`
    After:  `%q = hadamard_quantize_rows(%x, block, encoding)`

    What others read too stays as it is: its result has to be written anyway.
    """
    count = 0
    for node in find(gm, QUANTIZE_ROWS):
        given = operands(node)
        if (call := _before(given["x"])) is not None:
            target, args = call
            edit.replace(node, edit.emit(gm, target, (*args, given["encoding"]), before=node))
            count += 1
    return count


def _before(x: Node) -> tuple[OpOverload, list[Any]] | None:
    """The fused operator for what gives `x`, and its operands but for the encoding; None if there is none."""
    if len(x.users) > 1:
        return None
    given = operands(x)
    if is_call(x, HADAMARD):
        return HADAMARD_QUANTIZE_ROWS, [given["x"], given["block"]]
    if is_call(x, aten.rms_norm.default) and len(given["normalized_shape"]) == 1 and given["eps"] is not None:
        return NORM_QUANTIZE_ROWS, [given["input"], given["weight"], given["eps"]]
    return None
