import pytest
import torch

from ir.canonical import canonicalize
from ir.edit import attribute
from ir.match import aten, find, operand
from tests.ir.graphs import operators, traced

H, EPS = 64, 1e-6


def rms(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


SPELLINGS = {
    "llama": lambda x, w: w * (x.float() * rms(x.float())).to(x.dtype),
    "gemma": lambda x, w: (x.float() * rms(x.float()) * (1.0 + w.float())).type_as(x),
    "gemma without float": lambda x, w: x * rms(x) * (w + 1),
    "gemma4": lambda x, w: (x.float() * torch.pow(x.float().pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).type_as(x),
    "olmo2": lambda x, w: (w * (x.float() * rms(x.float()))).to(x.dtype),
    "t5": lambda x, w: w * (x * rms(x.float())).to(w.dtype),
    "helium": lambda x, w: (w.float() * (x.float() * rms(x.float()))).to(x.dtype),
    "root cast first": lambda x, w: x * rms(x.float()).to(x.dtype) * w,
    "square of product": lambda x, w: x.float().mul(torch.rsqrt((x.float() * x.float()).mean(-1, True) + EPS)).to(x.dtype) * w,
    "square": lambda x, w: (x.float() * torch.rsqrt(EPS + x.float().square().mean(-1, keepdim=True))).to(x.dtype) * w,
    "divided by root": lambda x, w: (x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * w,
    "divided by power": lambda x, w: (x.float() / (x.float().pow(2).mean(-1, keepdim=True) + EPS) ** 0.5).to(x.dtype) * w,
    "reciprocal of root": lambda x, w: (x.float() * (1 / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype) * w,
    "sum over size": lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) / H + EPS)).to(x.dtype) * w,
    "axis by number": lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean(2, keepdim=True) + EPS)).to(x.dtype) * w,
    "no epsilon": lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype) * w,
    "weightless": lambda x, w: (x.float() * rms(x.float())).to(x.dtype),
    "in the input's dtype": lambda x, w: w * (x * rms(x)),
    "of a difference": lambda x, w: w * ((x - w) * rms(x - w)),
}


def sample(dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, H, generator=generator).to(dtype), (0.3 * torch.randn(H, generator=generator) + 1).to(dtype)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_raises_every_spelling_and_keeps_its_function(name, dtype):
    x, w = sample(dtype)
    gm = traced(SPELLINGS[name], x, w=w)
    (before,) = gm(x)
    assert canonicalize(gm)["raise-rms-norm"] == 1
    (after,) = gm(x)
    assert [name for name in operators(gm) if name not in {"to.dtype", "sub.Tensor"}] == ["rms_norm"]
    exact = SPELLINGS[name](x.double(), w.double())
    assert after.dtype == before.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    elif name != "of a difference":  # there the difference is rounded, and not by the norm
        roundings = 2 if name == "gemma without float" else 1  # there the gain is rounded too
        torch.testing.assert_close(after.double(), exact, rtol=roundings * 2**-8, atol=0)


def test_a_gain_of_one_plus_w_becomes_a_parameter_in_the_dtype_it_is_computed_in():
    x, w = sample(torch.bfloat16)
    gm = traced(SPELLINGS["gemma"], x, w=w)
    canonicalize(gm)
    (norm,) = find(gm, aten.rms_norm.default)
    gain = operand(norm, "weight")
    assert gain.target == "gain"
    torch.testing.assert_close(attribute(gm, gain).data, 1 + w.float(), rtol=0, atol=0)
    assert [name for name, _ in gm.named_parameters()] == ["gain"]


def test_norms_that_share_a_gain_share_its_parameter():
    x, w = sample(torch.float32)
    gm = traced(lambda x, w: SPELLINGS["gemma"](torch.relu(SPELLINGS["gemma"](x, w)), w), x, w=w)
    assert canonicalize(gm)["raise-rms-norm"] == 2
    assert len({operand(norm, "weight") for norm in find(gm, aten.rms_norm.default)}) == 1


def test_a_result_wider_than_the_source_is_normed_wide():
    x, w = sample(torch.bfloat16)
    gm = traced(lambda x, w: x.float() * rms(x.float()), x, w=w)
    canonicalize(gm)
    assert operators(gm) == ["to.dtype", "rms_norm"]
    torch.testing.assert_close(gm(x)[0], x.float() * rms(x.float()))


def test_the_cast_of_a_reader_is_not_taken_in():
    x, w = sample(torch.bfloat16)
    gm = traced(lambda x, w: torch.relu(SPELLINGS["llama"](x, w).float()), x, w=w)
    canonicalize(gm)
    assert operators(gm) == ["rms_norm", "to.dtype", "relu"]


def test_values_read_elsewhere_stay():
    x, w = sample(torch.float32)
    gm = traced(lambda x, w: torch.cat([x * rms(x) * w, x * rms(x)], -1), x, w=w)
    assert canonicalize(gm)["raise-rms-norm"] == 1
    assert sorted(operators(gm)) == ["cat", "mul.Tensor", "rms_norm"]


def test_limit_1_only_the_last_axis():
    x, w = sample(torch.float32)
    gm = traced(lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w, x, w=w)
    assert "raise-rms-norm" not in canonicalize(gm)


def test_limit_2_a_gain_per_head_stays_a_product():
    x, _ = sample(torch.float32)
    gm = traced(lambda x, w: x * rms(x) * w, x, w=torch.randn(5, H))
    assert canonicalize(gm)["raise-rms-norm"] == 1
    assert operators(gm) == ["rms_norm", "mul.Tensor"]


NOT_NORMS = {
    "another value is normed": lambda x, w: torch.relu(x) * rms(x),
    "no mean": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "mean of cubes": lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS),
    "scaled epsilon": lambda x, w: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1.0, alpha=2)),
    "epsilon that is a value": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs()),
    "root not inverted": lambda x, w: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "mean over everything": lambda x, w: x * torch.rsqrt(x.pow(2).mean() + EPS),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_leaves_what_only_looks_like_a_norm(name):
    x, w = sample(torch.float32)
    gm = traced(NOT_NORMS[name], x, w=w)
    assert "raise-rms-norm" not in canonicalize(gm)
