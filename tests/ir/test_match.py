import pytest
import torch

from ir.edit import drop_unread, set_operand
from ir.match import Cast, OneOf, Op, Var, aten, find, is_call, match, operand, operands
from tests.ir.graphs import traced


def graph():
    gm = traced(lambda x: torch.dropout(x.float() + 2, 0.25, True).mul(x).to(torch.bfloat16), torch.randn(4, 5, 8, dtype=torch.bfloat16))
    for node in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    return gm


def one(gm, target):
    (node,) = find(gm, target)
    return node


def test_find_is_by_operator_in_graph_order():
    gm = graph()
    assert [node.target for node in find(gm, aten.mul.Tensor, aten.add.Tensor)] == [aten.add.Tensor, aten.mul.Tensor]


def test_operands_go_by_schema_name_with_defaults():
    add, dropout = one(gm := graph(), aten.add.Tensor), one(gm, aten.dropout.default)
    assert (operand(add, "other"), operand(add, "alpha")) == (2, 1)
    assert operands(dropout) == {"input": add, "p": 0.25, "train": True}
    with pytest.raises(KeyError):
        operand(add, "weight")


def test_set_operand_reaches_positional_named_and_default_operands():
    gm = graph()
    add = one(gm, aten.add.Tensor)
    for name, number in (("other", 3), ("alpha", 5), ("alpha", 6)):
        set_operand(add, name, number)
        assert operand(add, name) == number
    gm.recompile()
    x = torch.randn(4, 5, 8).bfloat16()
    set_operand(one(gm, aten.dropout.default), "train", False)
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], ((x.float() + 18) * x).bfloat16())


def test_patterns_bind_in_either_order_where_they_commute():
    mul = one(gm := graph(), aten.mul.Tensor)
    inner = Op(aten.dropout.default, Var("v"), 0.25, True)
    assert match(Op(aten.mul.Tensor, Var("x"), inner), mul) is None
    found = match(Op(aten.mul.Tensor, Var("x"), inner, commutes=True), mul)
    assert is_call(found["v"], aten.add.Tensor)
    assert found["x"] is gm.graph.find_nodes(op="placeholder")[0]


def test_a_variable_is_one_thing_behind_casts():
    mul = one(graph(), aten.mul.Tensor)
    x = Cast(Var("x"), widening=True)
    same = Op(aten.mul.Tensor, Op(aten.dropout.default, Op(aten.add.Tensor, x, 2), 0.25, True), x)
    assert match(same, mul)["x"].op == "placeholder"
    strict = Op(aten.mul.Tensor, Op(aten.dropout.default, Op(aten.add.Tensor, Var("x"), 2), 0.25, True), Var("x"))
    assert match(strict, mul) is None


def test_operands_that_a_pattern_leaves_out_have_their_defaults():
    add = one(graph(), aten.add.Tensor)
    assert match(Op(aten.add.Tensor, Var("x"), 2), add)
    set_operand(add, "alpha", 2)
    assert match(Op(aten.add.Tensor, Var("x"), 2), add) is None


def test_the_first_alternative_that_fits_wins():
    add = one(graph(), aten.add.Tensor)
    assert match(OneOf(Op(aten.sub.Tensor, Var("a"), 2), Op(aten.add.Tensor, Var("b"), 2), Var("c")), add).keys() == {"b"}


def test_widening_stops_at_casts_that_lose_digits():
    gm = graph()
    last = find(gm, aten.to.dtype)[-1]
    assert is_call(match(Cast(Var("x")), last)["x"], aten.mul.Tensor)
    assert match(Cast(Var("x"), widening=True), last)["x"] is last


def test_drop_unread_takes_whole_chains():
    gm = graph()
    gm.graph.output_node().args = ((gm.graph.find_nodes(op="placeholder")[0],),)
    drop_unread(gm)
    assert {node.op for node in gm.graph.nodes} == {"placeholder", "output"}
