"""Whether a call's operands fit its operator's schema."""

from collections.abc import Iterator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ir.match import is_tensor

SIZES = ("int", "SymInt")
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (int, float, complex),  # a number passes for a tensor without axes
    **dict.fromkeys(SIZES, (int, torch.SymInt)),
    "float": (int, float),
    "number": (int, float, complex),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
}


def misfits(node: Node, target: OpOverload) -> Iterator[str]:
    """What is wrong with the operands of a call of `target`, one sentence each."""
    arguments = target._schema.arguments
    names = [argument.name for argument in arguments]
    if len(node.args) > sum(not argument.kwarg_only for argument in arguments):
        yield f"it has {len(node.args)} positional operands, {target} takes {len(names)}"
    if unknown := sorted(set(node.kwargs) - set(names)) + [name for name in names[: len(node.args)] if name in node.kwargs]:
        yield f"operands {unknown} are not in the schema, or given twice; there are {names}"
    for index, argument in enumerate(arguments):
        if index < len(node.args) or argument.name in node.kwargs:
            given = node.args[index] if index < len(node.args) else node.kwargs[argument.name]
            if not _fits(given, str(argument.real_type)):
                yield f"operand {argument.name!r} is {given!r}, expected {argument.real_type}"
        elif not argument.has_default_value():
            yield f"operand {argument.name!r} is missing"


def _fits(given: object, kind: str) -> bool:
    """Whether an operand can be of a schema type: nodes by what they record, the rest by Python's type."""
    if kind.startswith("Optional["):
        return given is None or _fits(given, kind.removeprefix("Optional[").removesuffix("]"))
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        if isinstance(given, list | tuple):
            return all(_fits(item, inner) for item in given)
        return _fits(given, inner) and inner in SIZES  # one size stands for a list of one
    if isinstance(given, Node):
        several = isinstance(given.meta.get("val"), list | tuple)
        return not several and (kind == "Tensor" or not is_tensor(given))  # a size passes for a tensor without axes
    return isinstance(given, PYTHON_TYPES.get(kind, object)) and given is not None
