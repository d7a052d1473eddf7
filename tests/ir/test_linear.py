import pytest
import torch

from ir.canonical import canonicalize
from ir.edit import attribute, module_path
from ir.match import aten, find, operand
from tests.ir.graphs import operators, traced

W, B = torch.randn(8, 6), torch.randn(6)
X = torch.randn(4, 5, 8)

PRODUCTS = {
    "conv1d": (lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(x.shape[0], x.shape[1], 6), True),
    "matmul": (lambda x, w, b: x @ w + b, True),
    "bias first": (lambda x, w, b: b + x @ w, True),
    "mm": (lambda x, w, b: torch.mm(x.reshape(-1, 8), w).reshape(x.shape[0], -1, 6), False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_parameter_become_linear(name):
    function, biased = PRODUCTS[name]
    gm = traced(function, X, w=W, b=B)
    canonicalize(gm)
    assert operators(gm)[-1] == "linear"
    (linear,) = find(gm, aten.linear.default)
    assert (operand(linear, "bias") is not None) == biased
    torch.testing.assert_close(gm(X)[0], function(X, W, B))


@pytest.mark.parametrize(
    "turn", [torch.t, lambda w: w.transpose(0, 1), lambda w: w.transpose(-1, -2), lambda w: w.permute(1, 0), lambda w: w.T]
)
def test_a_parameter_that_is_turned_for_the_product_is_read_as_it_is(turn):
    w = W.t().contiguous()
    gm = traced(lambda x, w: x @ turn(w), X, w=w)
    canonicalize(gm)
    assert operators(gm) == ["linear"]
    assert [name for name, _ in gm.named_parameters()] == ["w"]
    torch.testing.assert_close(gm(X)[0], X @ W)


def test_the_weight_is_a_contiguous_copy_and_the_old_parameter_goes():
    gm = traced(PRODUCTS["conv1d"][0], X, w=W, b=B)
    canonicalize(gm)
    assert operators(gm) == ["linear"]
    assert sorted(name for name, _ in gm.named_parameters()) == ["b", "w_transposed"]
    (linear,) = find(gm, aten.linear.default)
    weight = attribute(gm, operand(linear, "weight"))
    assert weight.is_contiguous()
    assert torch.equal(weight, W.t())


def test_products_that_share_a_parameter_share_its_transpose():
    gm = traced(lambda x, w: (torch.relu(x @ w)) @ w, X, w=torch.randn(8, 8))
    assert canonicalize(gm)["raise-linear"] == 2
    assert [name for name, _ in gm.named_parameters()] == ["w_transposed"]


LEFT = {
    "a product of two values": lambda x, w, b: x @ x.transpose(1, 2),
    "a scaled product": lambda x, w, b: torch.addmm(b, x.view(-1, 8), w, alpha=2.0),
    "a parameter of three axes": lambda x, w, b: x @ w.expand(1, 8, 6),
    "a bias per row": lambda x, w, b: torch.addmm(x.view(-1, 8)[:, :6], x.view(-1, 8), w),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_other_products(name):
    gm = traced(LEFT[name], X, w=W, b=B)
    assert "raise-linear" not in canonicalize(gm)


def test_a_value_before_its_bias_that_is_read_elsewhere_stays():
    gm = traced(lambda x, w, b: torch.cat([x @ w, x @ w + b], -1), X, w=W, b=B)
    assert "fold-bias" not in canonicalize(gm)


def test_gpt2s_linears_keep_their_module_paths(families):
    gm = families("gpt2").graph()
    canonicalize(gm)
    paths = [module_path(node) for node in find(gm, aten.linear.default)]
    assert paths[:4] == [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert not {"addmm", "view", "tanh"} & set(operators(gm))
