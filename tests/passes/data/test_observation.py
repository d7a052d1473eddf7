import pytest

from ir import evaluate
from ir.sites import readers
from passes.data.calibration import tokens_in
from passes.data.observation import mean_squares, sampled
from tests.families import load
from tests.passes.samples import CALIBRATION, context, run


@pytest.mark.parametrize(("tokens", "expected"), [(1, 48), (96, 96), (10**6, 192)])
def test_a_sample_is_spread_over_all_batches(tokens, expected):
    ctx = context(load("llama").graph(), CALIBRATION)
    fewer = sampled(ctx, tokens)
    assert sum(map(tokens_in, fewer.calibration)) == expected
    assert len(fewer.calibration) == len(ctx.calibration)
    assert fewer.notes is ctx.notes  # what it says is said to all


def test_mean_squares_are_those_of_the_inputs():
    gm = load("llama").graph()
    _, ctx = run(gm, "canonicalize", CALIBRATION[:1])
    source = next(iter(readers(gm)))
    found = []
    evaluate.run(gm, ctx.calibration[0], lambda node, value: found.append(value) if node is source else None)
    exact = found[0].flatten(0, -2).double().square().mean(0)
    assert (mean_squares(gm, ctx, {source})[source].double() - exact).abs().max() < 1e-6
