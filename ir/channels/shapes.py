"""Shapes of labels: those of values, with what varies from call to call taken as 1."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ir import edit


def label_shape(fake: Tensor) -> tuple[int, ...]:
    """A value's shape with what varies from call to call taken as 1: `[s, 4·s, 64]` is `[1, 4, 64]`."""
    return tuple(fixed_factor(size) for size in fake.shape)


def fixed_factor(size: Any) -> int:
    """The number that divides a size whatever its symbols are: 4 for `4·s`, and for `4·s + 8`."""
    if isinstance(size, int):
        return size
    number, _ = size.node.expr.as_content_primitive()
    return int(number) if number.is_Integer and number > 0 else 1


def shared_axes(other: object, labels: Tensor) -> list[int]:
    """The axes, from the last, along which labels tell channels apart and an operand without labels may have values of its own."""
    if not isinstance(other, Node) or not isinstance(edit.value(other), torch.Tensor):
        return []
    sizes = zip(reversed(edit.value(other).shape), reversed(labels.shape), strict=False)
    return [-1 - axis for axis, (size, have) in enumerate(sizes) if have > 1 and not (isinstance(size, int) and size == 1)]


def in_order(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether labels may be reshaped as a value is from one shape to another: nothing that varies lies inside of what is rearranged."""
    return all(_varies_outside(side) for part in _parts(before, after) for side in part)


def _varies_outside(sizes: Sequence[Any]) -> bool:
    """Whether in a run of axes only those before the first fixed number vary: `[s, 4]` or `[4·s]`, not `[4, s]`."""
    fixed = False
    for size in sizes:
        if fixed and not isinstance(size, int):
            return False
        fixed |= fixed_factor(size) > 1
    return True


def _parts(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """The shortest runs of axes of two shapes that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        end = next(
            (m, n)
            for m in range(i, len(before) + 1)
            for n in range(j, len(after) + 1)
            if (m, n) != (i, j) and ((m, n) == (len(before), len(after)) or _same(before[i:m], after[j:n]))
        )
        yield before[i : end[0]], after[j : end[1]]
        i, j = end


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return statically_known_true(prod(a) == prod(b))
