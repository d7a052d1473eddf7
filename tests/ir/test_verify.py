import operator

import pytest
import torch

from ir.canonical import canonicalize
from ir.edit import add_attribute, clean, emit, set_operand
from ir.errors import DataError, GraphError
from ir.match import aten, find
from ir.ops import DEQUANTIZE, HADAMARD, QUANTIZE
from ir.verify import RULES, check_weights, verify
from tests.ir.graphs import traced

WEIGHT = torch.randn(6, 8)


def sound():
    gm = traced(lambda x, w: torch.nn.functional.linear(x.relu(), w).neg(), torch.randn(4, 5, 8), w=WEIGHT.clone())
    canonicalize(gm)
    return gm


def quantized(encoding="i8[1,-1]", scale=(6, 1), zero_point=None, codes=torch.int8):
    gm = sound()
    (linear,) = find(gm, aten.linear.default)
    parts = [
        add_attribute(gm, "codes", torch.zeros(6, 8, dtype=codes), before=linear),
        add_attribute(gm, "scale", torch.ones(scale), before=linear),
    ]
    parts.append(None if zero_point is None else add_attribute(gm, "zero_point", torch.zeros(zero_point, dtype=torch.uint8), before=linear))
    with gm.graph.inserting_before(linear):
        new = gm.graph.call_function(DEQUANTIZE, (*parts, encoding, torch.float32))
    new.meta["val"] = linear.args[1].meta["val"]
    set_operand(linear, "weight", new)
    clean(gm)
    return gm


def rotated():
    gm = sound()
    linear = node(gm, aten.linear.default)
    set_operand(linear, "input", emit(gm, HADAMARD, (linear.args[0], 4), before=linear))
    return gm


def in_blocks_of(block):
    def breaks(gm):
        set_operand(node(gm, HADAMARD), "block", block)

    return breaks


def node(gm, target):
    (found,) = find(gm, target)
    return found


def calling_a_module(gm):
    gm.add_module("_guards_fn", torch.nn.Identity())
    with gm.graph.inserting_before(node(gm, aten.relu.default)):
        gm.graph.call_module("_guards_fn", ())


def python_function(gm):
    node(gm, aten.relu.default).target = torch.relu


def in_place(gm):
    node(gm, aten.relu.default).target = aten.relu_.default


def read_before_defined(gm):
    output = node(gm, aten.neg.default)
    node(gm, aten.relu.default).append(output)


def too_few(gm):
    node(gm, aten.linear.default).args = node(gm, aten.linear.default).args[:1]


def too_many(gm):
    node(gm, aten.relu.default).args += (1,)


def unknown_name(gm):
    node(gm, aten.relu.default).kwargs = {"inplace": True}


def number_for_a_string(gm):
    relu = node(gm, aten.relu.default)
    relu.target, relu.kwargs = aten.gelu.default, {"approximate": 1}


def tensor_for_a_size(gm):
    relu = node(gm, aten.relu.default)
    relu.target, relu.args = aten.reshape.default, (relu.args[0], [relu.args[0], 8])


def missing_parameter(gm):
    del gm._parameters["w"]


def other_shape(gm):
    gm._parameters["w"] = torch.nn.Parameter(torch.zeros(6, 9), requires_grad=False)


def other_dtype(gm):
    gm._parameters["w"] = torch.nn.Parameter(WEIGHT.half(), requires_grad=False)


def no_value(gm):
    del node(gm, aten.relu.default).meta["val"]


def unread(gm):
    emit(gm, aten.neg.default, node(gm, aten.relu.default).args, before=node(gm, aten.relu.default))


def mixed_product(gm):
    linear = node(gm, aten.linear.default)
    weight = emit(gm, aten.to.dtype, (linear.args[1], torch.bfloat16), before=linear)
    set_operand(linear, "weight", weight)


def annotated(marks):
    def breaks(gm):
        node(gm, aten.linear.default).meta["custom"] = {"fxpress": marks}

    return breaks


def bare_output(gm):
    gm.graph.output_node().args = gm.graph.output_node().args[0]


def nested_output(gm):
    gm.graph.output_node().args = ((gm.graph.output_node().args[0],),)


def other_signature(gm):
    gm.meta["signature"] = type("Signature", (), {"inputs": (1, 2), "outputs": (1,)})


def other_outputs(gm):
    gm.meta["signature"] = type("Signature", (), {"inputs": (1,), "outputs": (1, 2)})


BROKEN = [
    ("nodes", sound, calling_a_module, "_guards_fn"),
    ("order", sound, read_before_defined, "comes later"),
    ("targets", sound, python_function, "not an operator overload"),
    ("targets", sound, in_place, "changes its operand"),
    ("schema", sound, too_few, "'weight' is missing"),
    ("schema", sound, too_many, "2 positional"),
    ("schema", sound, unknown_name, "inplace"),
    ("schema", sound, number_for_a_string, "expected str"),
    ("schema", sound, tensor_for_a_size, "expected List"),
    ("attributes", sound, missing_parameter, "no tensor 'w'"),
    ("attributes", sound, other_shape, "6, 9"),
    ("attributes", sound, other_dtype, "float16"),
    ("values", sound, no_value, 'no meta["val"]'),
    ("readers", sound, unread, "nothing reads it"),
    ("dtypes", sound, mixed_product, "weight is torch.bfloat16"),
    ("encodings", lambda: quantized("i9[1,-1]"), None, "i9"),
    ("encodings", lambda: quantized(scale=(6, 2)), None, "needs [6, 1]"),
    ("encodings", lambda: quantized(codes=torch.uint8), None, "torch.int8"),
    ("encodings", lambda: quantized("u8[1,-1]", codes=torch.uint8), None, "a zero point"),
    ("encodings", lambda: quantized(zero_point=(6, 1)), None, "no zero point"),
    ("encodings", lambda: quantized("u8[1,-1]", codes=torch.uint8, zero_point=(1, 1)), None, "zero_point has shape"),
    ("transforms", rotated, in_blocks_of(3), "3 does not divide 8; the nearest block for 8 channels is 4"),
    ("transforms", rotated, in_blocks_of(-8), "-8 does not divide 8"),
    ("annotations", sound, annotated({"weight": "i4"}), "not an encoding"),
    ("annotations", sound, annotated({"kernel": "i4[1,-1]"}), "not a tensor operand"),
    ("annotations", sound, annotated({"bias": "i4[-1]"}), "not a tensor operand"),
    ("outputs", sound, bare_output, "something else"),
    ("outputs", sound, nested_output, "something else"),
    ("outputs", sound, other_signature, "1 placeholders"),
    ("outputs", sound, other_outputs, "1 values"),
]


@pytest.mark.parametrize(("rule", "make", "breaks", "detail"), BROKEN, ids=lambda part: getattr(part, "__name__", str(part)))
def test_every_rule_finds_its_fault(rule, make, breaks, detail):
    gm = make()
    if breaks is not None:
        verify(gm)
        breaks(gm)
    with pytest.raises(GraphError) as error:
        verify(gm, "the-pass")
    assert f"rule is called {rule!r}" in error.value.remedy
    assert "after the-pass" in error.value.what
    assert detail in error.value.what


def test_every_rule_has_a_broken_graph():
    assert {rule.name for rule in RULES} == {rule for rule, *_ in BROKEN}


QUANTIZED = [
    ("i4[1,4]", (6, 2), None, torch.int8),
    ("u4[1,-1]", (6, 1), (6, 1), torch.uint8),
    ("f8e4m3[-1]", (1, 1), None, torch.float8_e4m3fn),
]


@pytest.mark.parametrize(("encoding", "scale", "zero_point", "codes"), QUANTIZED)
def test_accepts_quantized_weights(encoding, scale, zero_point, codes):
    verify(quantized(encoding, scale, zero_point, codes))


def test_accepts_quantized_values_of_varying_length():
    gm = sound()
    relu = node(gm, aten.relu.default)
    scale = add_attribute(gm, "scale", torch.ones(1, 1, 1), before=relu)
    codes = emit(gm, QUANTIZE, (relu.args[0], scale, None, "i8[-1]"), before=relu)
    set_operand(relu, "self", emit(gm, DEQUANTIZE, (codes, scale, None, "i8[-1]", torch.float32), before=relu))
    verify(gm)


def test_accepts_arithmetic_on_sizes():
    gm = traced(lambda x: x.new_zeros(x.shape[0] * 2 + x.shape[1]), torch.randn(4, 5, 8))
    canonicalize(gm)
    assert {operator.mul, operator.add} & {node.target for node in gm.graph.nodes}
    verify(gm)


def test_the_error_shows_the_neighbourhood_the_module_and_the_source(families):
    gm = families("llama").graph()
    canonicalize(gm)
    linear = find(gm, aten.linear.default)[3]
    set_operand(linear, "weight", 1.5)
    set_operand(linear, "input", [1])
    with pytest.raises(GraphError) as error:
        verify(gm)
    lines = error.value.where.splitlines()
    assert "module model.layers.0.self_attn.o_proj" in lines[0]
    assert "modeling_llama.py" in lines[0]
    assert [line.strip()[0] for line in lines[1:]] == ["%", "%", "%", ">", "%", "%", "%"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(bad, dtype):
    gm = traced(lambda x, w: x @ w.float(), torch.randn(4, 5, 8), w=torch.randn(8, 8).to(dtype))
    check_weights(gm)
    gm.w[2, 3] = bad
    with pytest.raises(DataError, match="parameter 'w' has 1 value"):
        check_weights(gm)
