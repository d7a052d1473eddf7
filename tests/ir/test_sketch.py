import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import DataError
from ir.sketch import RELATIVE_ERROR, QuantileSketch

VALUES = st.one_of(
    st.just(0.0), st.floats(-100, 100, width=32), st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-(2.0**-60), 2.0**-60, width=32)
)


@st.composite
def samples(draw, channels=3, most=12):
    tokens = draw(st.integers(0, most))
    return torch.tensor(draw(st.lists(VALUES, min_size=tokens * channels, max_size=tokens * channels))).reshape(tokens, channels)


def sketch_of(*batches: Tensor) -> QuantileSketch:
    sketch = QuantileSketch.empty(3)
    for batch in batches:
        sketch.update(batch)
    return sketch


def same(a: QuantileSketch, b: QuantileSketch) -> bool:
    return torch.equal(a.counts, b.counts) and torch.equal(a.top, b.top) and torch.equal(a.maximum, b.maximum)


def assert_within_bound(found: Tensor, x: Tensor, q: float) -> None:
    expected = torch.quantile(x.double().abs(), q, dim=0)
    bound = RELATIVE_ERROR * expected + 2.0**-23 * x.double().abs().amax(0) + 1e-37  # subnormals have fewer bits
    assert ((found.double() - expected).abs() <= bound * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(samples(), st.floats(0, 1))
def test_a_quantile_is_within_the_stated_bound(x, q):
    if len(x):
        assert_within_bound(sketch_of(x).quantile(q), x, q)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.95, 0.994, 0.9999]), st.sampled_from([0.0, 3.0, 40.0]))
def test_quantiles_of_heavy_tails_are_within_the_bound(seed, q, outlier):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 3, generator=generator) * torch.randn(2000, 3, generator=generator).mul(2).exp()
    x[::500] *= 2.0**outlier / 2.0**25
    assert_within_bound(sketch_of(x).quantile(q), x, q)


@pytest.mark.parametrize("outlier", [1.0, 2000.0, 1e5])
@pytest.mark.parametrize("shape", [lambda z: z, torch.exp, lambda z: z.square() * z], ids=["gaussian", "lognormal", "cubed"])
def test_ranks_are_within_a_tenth_of_a_percent(shape, outlier):
    x = shape(torch.randn(40_000, 3, generator=torch.Generator().manual_seed(0)))
    x[::400] *= outlier
    sketch = sketch_of(x)
    for q in (0.5, 0.9, 0.99, 0.994, 0.999, 0.9995):
        rank = (x.abs() <= sketch.quantile(q)).double().mean(0)
        assert ((rank - q).abs() < 1e-3).all()


@settings(max_examples=60, deadline=None)
@given(samples())
def test_the_mean_is_within_the_bound_of_quantiles(x):
    expected = x.double().abs().sum(0) / max(len(x), 1)
    greatest = x.double().abs().amax(0) if len(x) else torch.zeros(3)
    bound = RELATIVE_ERROR * expected + 2.0**-23 * greatest + 1e-37
    assert ((sketch_of(x).mean() - expected).abs() <= bound * (1 + 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(samples())
def test_the_greatest_quantile_is_exact(x):
    expected = x.abs().amax(0) if len(x) else torch.zeros(3)
    assert torch.equal(sketch_of(x).quantile(1), expected)


@settings(max_examples=40, deadline=None)
@given(samples(), samples(), samples())
def test_updates_and_merges_commute_and_associate_exactly(x, y, z):
    a, b, c = sketch_of(x), sketch_of(y), sketch_of(z)
    whole = sketch_of(torch.cat([x, y, z]))
    assert same(whole, sketch_of(z, x, y))
    assert same(whole, a.merge(b).merge(c))
    assert same(whole, a.merge(b.merge(c)))
    assert same(a.merge(b), b.merge(a))


def test_large_batches_are_counted_in_parts_with_the_same_result(monkeypatch):
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    whole = sketch_of(x)
    monkeypatch.setattr("ir.sketch._CHUNK", 21)
    assert same(whole, sketch_of(x))


@settings(max_examples=40, deadline=None)
@given(samples(), st.floats(0, 1))
def test_the_pooled_sketch_is_that_of_the_whole_tensor(x, q):
    if len(x):
        pooled = sketch_of(x).pooled()
        assert pooled.count == x.numel()
        assert_within_bound(pooled.quantile(q), x.reshape(-1, 1), q)


def test_the_state_does_not_grow_and_takes_1544_bytes_a_channel():
    sketch = QuantileSketch.empty(1000)
    for seed in range(3):
        sketch.update(torch.randn(50, 1000, generator=torch.Generator().manual_seed(seed)) * 10**seed)
        assert sum(t.untyped_storage().nbytes() for t in (sketch.counts, sketch.top, sketch.maximum)) == 1544 * 1000
    assert sketch.count == 150


def test_bfloat16_and_float64_samples_are_counted():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same(sketch_of(x), sketch_of(x.double()))


def test_an_empty_sketch_has_zero_quantiles():
    assert torch.equal(QuantileSketch.empty(2).quantile(0.5), torch.zeros(2))


def test_misuse_is_refused():
    sketch = QuantileSketch.empty(2)
    with pytest.raises(DataError, match="2 channels"):
        sketch.update(torch.zeros(4, 3))
    with pytest.raises(DataError, match="merged"):
        sketch.merge(QuantileSketch.empty(3))
    with pytest.raises(DataError, match="between 0 and 1"):
        sketch.quantile(1.5)


def test_counts_never_overflow():
    sketch = sketch_of(torch.ones(1, 3))
    sketch.counts[:, -1] = 2**31 - 1
    with pytest.raises(DataError, match="at most"):
        sketch.update(torch.ones(1, 3))
