from dataclasses import replace

import pytest
import torch

from ir.errors import DataError, OptionError
from ir.smoothing import layer_error, magnitude, scales, weight_magnitude
from tools.scale_learning import RATES, Layer, Recipe, learn, learn_best

IN, OUT = 64, 48
CLOSE = 0.01  # a common factor moves values that lie between two codes, as every maximum does
QUICK = Recipe(steps=40, rate=2e-2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(seed=0, start=None):
    spread = (1.5 * normal(IN, seed=seed + 3)).exp()
    X, held = (normal(256, IN, seed=seed + part) * spread for part in (0, 1))
    return Layer(X, normal(OUT, IN, seed=seed + 2), held, start)


def smoothed(seed=0):
    plain = layer(seed)
    return replace(plain, start=scales(magnitude(plain.X), weight_magnitude(plain.W), 0.5))


def error(at, s, **clip):
    return float(layer_error(at.held, at.W, s, **clip)[1])


def test_learned_scales_beat_their_start():
    for at in (layer(), smoothed()):
        (found,) = learn([at], QUICK)
        assert found.error < error(at, at.start)
        assert error(at, found.s) == pytest.approx(found.error, rel=CLOSE)
        assert float(found.s.log().mean()) == pytest.approx(0, abs=1e-5)
        assert float(found.clip_x) == 1 and torch.equal(found.clip_w, torch.ones(OUT))


def test_clipping_beats_scales_alone():
    at = smoothed()
    (plain,), (clipped,) = learn([at], QUICK), learn([at], replace(QUICK, clip=True))
    assert clipped.error < plain.error
    assert float(clipped.clip_x) < 1
    assert error(at, clipped.s, clip_x=clipped.clip_x, clip_w=clipped.clip_w) == pytest.approx(clipped.error, rel=CLOSE)


def test_several_layers_are_learned_together_as_each_by_itself():
    together = learn([layer(0), layer(10)], QUICK)
    for at, found in zip((layer(0), layer(10)), together, strict=True):
        assert found.error < error(at, None)


def test_learning_is_deterministic_in_the_seed():
    recipe = replace(QUICK, batch=32, steps=10)
    (a,), (b,), (c,) = learn([layer()], recipe), learn([layer()], recipe), learn([layer()], replace(recipe, seed=1))
    assert torch.equal(a.s, b.s)
    assert not torch.equal(a.s, c.s)


def test_no_steps_give_the_start():
    at = smoothed()
    (found,) = learn([at], Recipe(steps=0))
    torch.testing.assert_close(found.s, (at.start.log() - at.start.log().mean()).exp())


def test_the_step_with_the_least_held_out_error_is_kept_and_patience_ends():
    at = smoothed()
    (wild,) = learn([at], Recipe(steps=200, rate=10.0, every=1, patience=3))
    assert wild.error <= error(at, at.start) * (1 + CLOSE)


def test_weights_may_be_left_unrounded():
    at = layer()
    (found,) = learn([at], replace(QUICK, bits_w=None))
    assert found.error < error(at, None)
    assert error(at, found.s, bits_w=None) == pytest.approx(found.error, rel=CLOSE)


def test_the_best_rate_is_chosen_on_held_out_tokens():
    at = smoothed()
    recipe, found = learn_best([at], replace(QUICK, steps=10), rates=(1e-6, 2e-2))
    assert recipe.rate == 2e-2
    assert found[0].error == learn([at], recipe)[0].error
    assert len(RATES) == 5 and RATES[0] == 5e-3 and RATES[-1] == pytest.approx(2e-2)


def test_bad_data_and_options_are_refused():
    at = layer()
    with pytest.raises(DataError, match="channels"):
        Layer(at.X, at.W[:, 1:], at.held)
    with pytest.raises(DataError, match="finite"):
        learn([replace(at, held=at.held * torch.inf)], QUICK)
    for wrong in ({"steps": -1}, {"rate": 0.0}, {"batch": 0}, {"every": 0}):
        with pytest.raises(OptionError):
            Recipe(**wrong)
