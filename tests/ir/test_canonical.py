import pytest
import torch

from ir.canonical import REWRITES, canonicalize
from ir.text import graph_text
from ir.verify import check_weights, verify
from tests.families import FAMILIES, LAYERS, RMS_NORMS
from tests.ir.graphs import operators, traced

ALL = [*((name, torch.float32) for name in FAMILIES), ("llama", torch.bfloat16), ("gemma2", torch.bfloat16)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative; the raised norms round once where the spelled-out ones round twice

NORMAL = {
    # what canonical graphs of the families are made of
    *("linear", "embedding", "rms_norm", "layer_norm", "scaled_dot_product_attention", "matmul", "softmax.int"),
    *("gelu", "silu", "relu", "tanh", "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "neg", "cos", "sin", "to.dtype"),
    *("reshape", "transpose.int", "unsqueeze", "expand", "slice.Tensor", "cat", "split.Tensor", "chunk", "index.Tensor"),
    *("arange", "zeros", "le.Tensor", "gt.Tensor", "ge.Scalar", "__and__.Tensor", "where.ScalarOther"),
    *("<built-in function add>", "<built-in function getitem>"),
}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("name", "dtype"), ALL, ids=lambda part: str(part).removeprefix("torch."))
def test_every_family_keeps_its_function_in_normal_form(families, name, dtype):
    family = families(name, dtype)
    gm = family.graph()
    counts = canonicalize(gm)
    verify(gm, "canonicalize")
    check_weights(gm)
    assert counts.get("raise-rms-norm", 0) == RMS_NORMS[name]
    assert set(operators(gm)) <= NORMAL
    for before, after in zip(family.steps(family.captured), family.steps(gm), strict=True):
        assert relative(after, before) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_is_idempotent_and_deterministic(families, name):
    once, again = families(name).graph(), families(name).graph()
    canonicalize(once)
    canonicalize(again)
    text = graph_text(once)
    assert graph_text(again) == text
    assert canonicalize(once) == {}
    assert graph_text(once) == text


def test_the_model_is_left_alone(families):
    family = families("gemma2")
    names = {name: parameter.clone() for name, parameter in family.model.named_parameters()}
    canonicalize(family.graph())
    assert all(torch.equal(parameter, names[name]) for name, parameter in family.model.named_parameters())


def test_bf16_keeps_its_dtypes(families):
    gm = families("llama", torch.bfloat16).graph()
    canonicalize(gm)
    assert {str(node.meta["val"].dtype) for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default} == {"torch.bfloat16"}


def test_gpt2_has_all_its_products_raised(families):
    assert canonicalize(families("gpt2").graph())["raise-linear"] == 4 * LAYERS


IDENTITIES = {
    "dropout": lambda x: torch.dropout(x, 0.5, False),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "clone": lambda x: x.relu().clone(),
    "slice": lambda x: x[:, :],
    "cast to its dtype": lambda x: x.to(torch.float32),
    "type of itself": lambda x: x.type_as(x),
    "times one": lambda x: x * 1.0,
    "plus nothing": lambda x: 0.0 + x - 0,
    "over one": lambda x: x / 1,
    "expanded to its shape": lambda x: x.expand(x.shape[0], x.shape[1], 8),
    "viewed as it is": lambda x: x.view(x.shape[0], x.shape[1], 8),
    "alone in a cat": lambda x: torch.cat([x], -1),
    "detach": lambda x: x.detach(),
    "flattened and back": lambda x: x.reshape(-1, 8).view(x.shape[0], x.shape[1], 8),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_drops_identities(name):
    x = torch.randn(4, 5, 8)
    gm = traced(lambda x: IDENTITIES[name](x.neg()).neg(), x)
    canonicalize(gm)
    assert [op for op in operators(gm) if op not in {"relu", "transpose.int"}] == ["neg", "neg"]
    torch.testing.assert_close(gm(x)[0], IDENTITIES[name](x.neg()).neg())


KEPT = {
    "a cast": (torch.float32, lambda x: x.to(torch.bfloat16).to(torch.float32), ["to.dtype", "to.dtype"]),
    "a widening cast": (torch.bfloat16, lambda x: x.float() + 1, ["to.dtype", "add.Tensor"]),
    "a product that changes dtype": (torch.int64, lambda x: x * 1.0, ["mul.Tensor"]),
    "a part": (torch.float32, lambda x: x[:, :, 2:], ["slice.Tensor"]),
    "every other": (torch.float32, lambda x: x[..., ::2], ["slice.Tensor"]),
    "expansion": (torch.float32, lambda x: x[:1].expand(3, -1, -1), ["slice.Tensor", "expand"]),
    "training dropout": (torch.float32, lambda x: torch.dropout(x, 0.5, True), ["dropout"]),
    "the copy of a returned input": (torch.float32, lambda x: x.clone(), ["clone"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_keeps_what_does_something(name):
    dtype, function, expected = KEPT[name]
    x = torch.randn(4, 5, 8).to(dtype)
    gm = traced(function, x)
    canonicalize(gm)
    assert [op for op in operators(gm) if not op.startswith("slice") or "slice.Tensor" in expected][-len(expected) :] == expected


def test_computes_repeated_expressions_once_but_random_ones_each_time():
    gm = traced(lambda x: x.cos() + x.cos() + torch.rand_like(x) + torch.rand_like(x), torch.randn(4, 5, 8))
    canonicalize(gm)
    assert sorted(set(operators(gm))) == ["add.Tensor", "cos", "rand_like"]
    assert (operators(gm).count("cos"), operators(gm).count("rand_like")) == (1, 2)


def test_calls_that_differ_only_in_the_type_of_a_number_stay_apart():
    gm = traced(lambda x: x.add(2) + x.add(2.0), torch.randint(3, (4, 5, 8)))
    canonicalize(gm)
    assert operators(gm).count("add.Tensor") == 3


def test_sizes_that_are_equal_are_read_once(families):
    gm = families("llama").graph()
    canonicalize(gm)
    sizes = [node.meta["val"].node.expr for node in gm.graph.nodes if node.target is torch.ops.aten.sym_size.int]
    assert len(sizes) == len(set(sizes))


def test_flatten_becomes_a_reshape_that_reads_its_sizes():
    x = torch.randn(4, 5, 8)
    gm = traced(lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2).flatten(2), x)
    canonicalize(gm)
    assert operators(gm) == ["reshape", "transpose.int", "reshape"]
    torch.testing.assert_close(gm(x[:3])[0], x[:3].unflatten(-1, (2, 4)).transpose(1, 2).flatten(2))


def test_sizes_fixed_by_the_trace_are_numbers_afterwards():
    program = torch.export.export(
        torch.nn.Linear(8, 6), (torch.randn(4, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    )
    gm = program.module(check_guards=False)
    canonicalize(gm)
    assert all(isinstance(node.meta["val"].shape[-1], int) for node in gm.graph.nodes if node.op != "output")


def test_every_rewrite_has_a_before_and_an_after():
    for name, rewrite in REWRITES.items():
        assert name == "settle-sizes" or ("Before:" in rewrite.__doc__ and "After:" in rewrite.__doc__), name
