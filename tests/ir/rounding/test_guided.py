import pytest
import torch

from ir.encoding import Encoding
from ir.errors import OptionError
from ir.rounding import GPTQ, Evidence, Guided, Nearest, row_groups
from tests.ir.rounding.samples import inputs, output_error, weight

GROUPS = 3


def grams():
    """Each group of outputs feels tokens of its own."""
    X = inputs(tokens=600)
    w = torch.rand(600, GROUPS, generator=torch.Generator().manual_seed(0)) ** 8
    return torch.stack([(X * w[:, g : g + 1]).T @ X for g in range(GROUPS)])


def found(rounding, encoding, evidence):
    """The sum over groups of what they feel."""
    W = weight()
    codes, qparams = rounding.round_weight(W, encoding, evidence)
    return sum(
        float(output_error(W, codes, qparams, encoding, H)[part].sum()) for H, part in zip(grams(), row_groups(12, GROUPS), strict=True)
    )


@pytest.mark.parametrize("text", ["u2[1,16]", "i3[1,-1]", "u4[2,16]"])
def test_it_makes_a_smaller_weighted_error_than_gptq_and_nearest(text):
    encoding, H = Encoding.parse(text), grams()
    mine = found(Guided(groups=GROUPS), encoding, Evidence(grams=H))
    assert mine < found(GPTQ(), encoding, Evidence(gram=H.mean(0)))
    assert mine < 0.7 * found(Nearest(search=True), encoding, Evidence(gram=H.mean(0)))


def test_one_group_is_gptq():
    encoding, W, H = Encoding.parse("u3[1,16]"), weight(), grams()[0]
    codes, qparams = Guided(groups=1).round_weight(W, encoding, Evidence(grams=H[None]))
    expected, parameters = GPTQ().round_weight(W, encoding, Evidence(gram=H))
    assert torch.equal(codes, expected)
    assert torch.equal(qparams.scale, parameters.scale)


def test_groups_that_share_scales_are_refused():
    for text in ("u3[-1]", "u3[5,16]"):
        with pytest.raises(OptionError, match="shared by rows of two groups"):
            Guided(groups=GROUPS).round_weight(weight(), Encoding.parse(text), Evidence(grams=grams()))
    with pytest.raises(OptionError, match="at least 1 group"):
        Guided(groups=0)


def test_groups_are_even_and_cover_all_rows():
    for N in (1, 3, 4, 10, 17):
        parts = row_groups(N, 4)
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == N
        assert parts[0].start == 0
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
