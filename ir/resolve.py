"""Operators by name: the closed lists that saved graphs may use."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from ir.errors import DataError

NAMESPACES = ("aten", "fxpress")
# Arithmetic on sizes; nothing else of these modules: `operator.attrgetter` alone reaches every object of the interpreter.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{function.__module__}:{function.__name__}": function
    for function in (
        *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, operator.neg),
        *(operator.pos, operator.abs, operator.and_, operator.or_, operator.not_, operator.getitem),
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        *(math.ceil, math.floor, math.trunc),
        *(torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_max, torch.sym_min, torch.sym_ite, torch.sym_sum),
    )
}
# Operators of aten that trust what they are given: layouts whose indices nobody checks, packed weights of libraries, formats of old.
UNCHECKED = re.compile(r"sparse|nested|jagged|(cs|bs)[rc]_|quantized|quantize_per|fbgemm|mkldnn|cudnn|miopen|storage")
# Private operators have no contract, so only those of the core set, which are checked as others are, and a few that captures hold.
PRIVATE = {"_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_grouped_mm", "_unsafe_view"}


def resolve(name: str) -> Callable[..., Any]:
    """The operator called `name`, from the namespaces and functions that graphs may use.

    Raises:
        DataError: any other; one that changes its operands or the interpreter's state, reads or writes files, or trusts indices.
    """
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    namespace, operation, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    found = getattr(getattr(getattr(torch.ops, namespace), operation), overload) if namespace in NAMESPACES else None
    if not isinstance(found, torch._ops.OpOverload) or not _pure(found) or not _checked(operation, found):
        raise DataError(f"{name!r} is not an operator of graphs")
    return found


def _pure(found: torch._ops.OpOverload) -> bool:
    """Whether an operator computes outputs from inputs and does nothing else; what no dispatcher knows is a function of TorchScript."""
    schema = found._schema
    dispatched = torch._C._dispatch_has_kernel(schema.name + (f".{schema.overload_name}" if schema.overload_name else ""))
    return dispatched and not schema.is_mutable and "filename" not in {argument.name for argument in schema.arguments}


def _checked(operation: str, found: torch._ops.OpOverload) -> bool:
    """Whether an operator looks at indices and sizes before it uses them."""
    if re.match(r"_[^_]", operation) and operation not in PRIVATE and torch.Tag.core not in found.tags:
        return False
    return UNCHECKED.search(operation) is None
