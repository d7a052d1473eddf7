"""What every rounding method keeps to."""

import pytest
import torch

from ir import numerics
from ir.encoding import Encoding
from ir.errors import DataError, OptionError
from ir.rounding import GPTAQ, GPTQ, METHODS, SCALE_DTYPE, YAQA, Evidence, ExactScales, Guided, Nearest, Qronos, Ternary
from ir.rounding.evidence import PARTS
from tests.ir.rounding.samples import ENCODINGS, ODD, compressed, gram, weight

ROUNDINGS = [
    Nearest(search=True),
    GPTQ(sweeps=1),
    GPTQ(act_order=True, sweeps=1),
    GPTAQ(sweeps=1),
    GPTAQ(act_order=True, sweeps=0),
    Qronos(sweeps=0),
    Qronos(act_order=True, sweeps=1),
    Guided(groups=1, sweeps=1),
    ExactScales(sweeps=2),
    YAQA(sweeps=1),
]


def evidence(N: int = 12, K: int = 40, groups: int = 1) -> Evidence:
    """All that a method can ask for."""
    X, X_hat = compressed(K)
    grams = torch.stack([gram(K, seed) for seed in range(groups)])
    return Evidence(X_hat.T @ X_hat, X.T @ X_hat, grams, gram(N, seed=2), gram(K, seed=3))


@pytest.mark.parametrize("text", ENCODINGS + ODD)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_codes_and_parameters_follow_the_convention(text, rounding):
    encoding, W = Encoding.parse(text), weight()
    codes, qparams = rounding.round_weight(W, encoding, evidence())
    least = numerics.choose_qparams(W, encoding, SCALE_DTYPE)
    assert codes.shape == W.shape
    assert codes.is_contiguous()
    assert codes.dtype == numerics.storage_dtype(encoding)
    assert qparams.scale.shape == least.scale.shape
    assert qparams.scale.dtype == SCALE_DTYPE
    assert (qparams.zero_point is None) == encoding.symmetric
    if qparams.zero_point is not None:
        assert qparams.zero_point.shape == least.scale.shape
        assert qparams.zero_point.dtype == torch.uint8
        assert int(qparams.zero_point.max()) < 2**encoding.bits
    if codes.dtype in (torch.int8, torch.uint8):
        low, high = numerics.code_range(encoding)
        assert low <= int(codes.min()) <= int(codes.max()) <= high
    assert torch.isfinite(numerics.dequantize(codes, qparams, encoding)).all()


@pytest.mark.parametrize("method", METHODS.values())
def test_a_method_needs_what_it_says_and_no_more(method):
    encoding, W, whole = Encoding.parse("i2[1,16]"), weight(), evidence(groups=4)
    given = {part: getattr(whole, part) for part in method.needs}
    codes, _ = method().round_weight(W, encoding, Evidence(**given))
    assert codes.shape == W.shape
    for part in method.needs:
        with pytest.raises(DataError, match=f"{method.__name__} needs {PARTS[part][0]}") as caught:
            method().round_weight(W, encoding, Evidence(**{**given, part: None}))
        assert caught.value.remedy


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("part", PARTS)
def test_misshapen_evidence_is_refused(method, part):
    encoding, W, whole = Encoding.parse("i2[1,16]"), weight(), evidence(groups=4)
    given = {name: getattr(whole, name) for name in {*method.needs, part}}
    for wrong in (given[part][..., :5], given[part] * torch.nan, given[part][..., 0]):
        with pytest.raises(DataError, match=PARTS[part][0]):
            method().round_weight(W, encoding, Evidence(**{**given, part: wrong}))


@pytest.mark.parametrize("method", METHODS.values())
def test_a_weight_that_is_no_finite_matrix_is_refused(method):
    for W in (weight() / 0, weight()[0]):
        with pytest.raises(DataError, match="finite"):
            method().round_weight(W, Encoding.parse("i2[1,16]"), evidence())


@pytest.mark.parametrize("method", METHODS.values())
def test_the_same_evidence_gives_the_same_codes_and_is_left_alone(method):
    encoding, W, whole = Encoding.parse("i2[1,16]"), weight(), evidence(groups=4)
    before = [W.clone(), *(getattr(whole, part).clone() for part in PARTS)]
    first, second = (method().round_weight(W, encoding, whole) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].scale, second[1].scale)
    assert all(torch.equal(a, b) for a, b in zip(before, [W, *(getattr(whole, part) for part in PARTS)], strict=True))


@pytest.mark.parametrize("method", [GPTQ, GPTAQ, Qronos, Guided, YAQA, Ternary])
def test_bad_options_are_refused(method):
    for options in ({"damping": -1.0}, {"sweeps": -1}):
        with pytest.raises(OptionError):
            method(**options)


def test_a_matrix_of_no_moments_is_refused():
    with pytest.raises(DataError, match="semidefinite"):
        GPTQ().round_weight(weight(), Encoding.parse("u4[1,16]"), Evidence(gram=torch.eye(40) - 100 * torch.eye(40).flip(0)))
