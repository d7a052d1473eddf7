"""What operators do to channels: one row for each, in `RULES`.

A row takes the flow and the node, reads the labels of the operands that it answers for, records ties, limits, bars and uses, and returns
the labels of the node's value: None if no map changes it. An operator without a row bars what it reads, and says so; so does an operand
that its row did not ask for.
"""

from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from ir import edit
from ir.channels import elementwise, layers, stored, structure
from ir.channels.flow import Flow, Rule, operator_name, where
from ir.channels.shapes import label_shape
from ir.match import aten

RULES: dict[Any, Rule] = {**layers.ROWS, **elementwise.ROWS, **structure.ROWS}
SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)  # of values, whatever is in them


def follow(flow: Flow, node: Node) -> None:
    """Label a call's value, if it carries channels."""
    if stored.see(flow, node):
        return
    if node.target is getitem:
        item = structure.item(flow, node)
        if item is not None:
            flow.labels[node] = item
        return
    labelled = flow.labelled(node)
    if node.target in SIZES or not (labelled or node.target in layers.ROWS):
        return
    flow.taken.clear()
    rule = RULES.get(node.target) or RULES.get(operator_name(node))
    labels: Any = flow.refuse(node, f"no rule says what {where(node)} does to channels") if rule is None else rule(flow, node)
    for name, found in labelled.items():
        for each in () if name in flow.taken else found:
            flow.bar(each, f"{where(node)} reads it as its {name}")
    if labels is not None:
        flow.labels[node] = _settled(flow, labels, edit.value(node))


def _settled(flow: Flow, labels: Any, value: Any) -> Any:
    """Labels in the shape of their values."""
    if isinstance(value, torch.Tensor):
        return flow.spread(labels, label_shape(value))
    return tuple(flow.spread(each, label_shape(one)) for each, one in zip(labels, value, strict=True))
