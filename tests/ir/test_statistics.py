import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ir.errors import DataError
from ir.statistics import FORMAT, Statistics, TensorStatistics

CHANNELS = 4


def batch(seed: int, tokens: int = 16, offset: float = 0.0):
    return torch.randn(tokens, CHANNELS, generator=torch.Generator().manual_seed(seed)) + offset


def statistics_of(*batches, **kept):
    statistics = TensorStatistics.empty(CHANNELS, **kept)
    for x in batches:
        statistics.update(x)
    return statistics


def assert_close(a: TensorStatistics, b: TensorStatistics):
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]))
def test_streamed_statistics_are_those_of_the_whole(sizes, offset):
    batches = [batch(seed, size, offset) for seed, size in enumerate(sizes)]
    x = torch.cat(batches)
    found = statistics_of(*batches, gram=True)
    assert found.count == len(x)
    if len(x) == 0:
        assert torch.equal(found.absmax, torch.zeros(CHANNELS))
        return
    assert torch.equal(found.minimum, x.amin(0))
    assert torch.equal(found.maximum, x.amax(0))
    assert torch.equal(found.absmax, x.abs().amax(0))
    assert found.range == (float(x.min()), float(x.max()))
    torch.testing.assert_close(found.mean, x.double().mean(0))
    torch.testing.assert_close(found.variance, x.double().var(0, correction=0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.second_moment, x.double().square().mean(0))
    torch.testing.assert_close(found.gram, x.T @ x)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(0, 30)] * 3))
def test_merging_is_taking_in_both(sizes):
    x, y, z = (batch(seed, size) for seed, size in enumerate(sizes))
    a, b, c = (statistics_of(part, gram=True) for part in (x, y, z))
    whole = statistics_of(x, y, z, gram=True)
    assert_close(whole, a.merge(b).merge(c))
    assert_close(whole, a.merge(b.merge(c)))
    assert_close(a.merge(b), b.merge(a))
    assert torch.equal(whole.sketch.counts, c.merge(a).merge(b).sketch.counts)


def test_leading_axes_are_tokens():
    x = batch(0, 24)
    assert_close(statistics_of(x), statistics_of(x.reshape(2, 3, 4, CHANNELS)))


def test_the_size_does_not_depend_on_the_number_of_tokens():
    statistics = TensorStatistics.empty(CHANNELS, gram=True)
    sizes = set()
    for seed in range(4):
        statistics.update(batch(seed, 10 ** (seed + 1)))
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in statistics.tensors().values()))
    assert sizes == {8 + CHANNELS * (1568 + 4 * CHANNELS)}


def test_large_batches_are_taken_in_in_parts(monkeypatch):
    whole = statistics_of(batch(0, 100), gram=True)
    monkeypatch.setattr("ir.statistics._CHUNK", 30)
    assert_close(whole, statistics_of(batch(0, 100), gram=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name_and_not_counted(bad):
    statistics = Statistics()
    statistics.observe("layers.0.mlp", batch(0))
    x = batch(1)
    x[3, 1] = bad
    with pytest.raises(DataError, match=r"not finite(.|\n)*where: layers\.0\.mlp"):
        statistics.observe("layers.0.mlp", x)
    assert_close(statistics["layers.0.mlp"], statistics_of(batch(0)))


def test_other_channels_are_refused_by_name():
    statistics = Statistics()
    statistics.observe("q", batch(0))
    with pytest.raises(DataError, match=r"where: q"):
        statistics.observe("q", torch.zeros(2, CHANNELS + 1))
    with pytest.raises(DataError, match=r"where: k"):
        statistics.observe("k", torch.tensor(1.0))
    assert set(statistics) == {"q"}


def sites() -> Statistics:
    statistics = Statistics()
    statistics.observe("model/layers.0.q_proj", batch(0), gram=True)
    statistics.observe("down", batch(1), sketch=False)
    return statistics


def test_merging_mappings_merges_what_both_have():
    more = Statistics()
    more.observe("down", batch(2), sketch=False)
    more.observe("up", batch(3))
    merged = sites().merge(more)
    assert set(merged) == {"model/layers.0.q_proj", "down", "up"}
    assert_close(merged["down"], statistics_of(batch(1), batch(2), sketch=False))
    assert sites()["down"].count == 16


def test_merging_what_is_kept_differently_is_refused_by_name():
    more = Statistics()
    more.observe("down", batch(2), gram=True)
    with pytest.raises(DataError, match=r"Gram(.|\n)*where: down"):
        sites().merge(more)


def test_saving_and_loading_is_exact_and_replaces_an_older_file(tmp_path):
    path = tmp_path / "stats.safetensors"
    Statistics().save(path)
    assert len(Statistics.load(path)) == 0
    sites().save(path)
    loaded = Statistics.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert set(loaded) == set(sites())
    for site, expected in sites().items():
        assert all(torch.equal(a, b) for a, b in zip(expected.tensors().values(), loaded[site].tensors().values(), strict=True))
    assert torch.equal(loaded["model/layers.0.q_proj"].sketch.quantile(0.9), sites()["model/layers.0.q_proj"].sketch.quantile(0.9))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.safetensors"
    sites().save(path)
    before = path.read_bytes()
    monkeypatch.setattr("ir.statistics.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Statistics().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "stats.safetensors"
    sites().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match="cannot be read"):
        Statistics.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"where: .*absent"):
        Statistics.load(tmp_path / "absent.safetensors")


def rewritten(tmp_path, change, metadata=FORMAT):
    path = tmp_path / "stats.safetensors"
    sites().save(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, FORMAT | {"version": "1"}])
def test_a_file_of_another_kind_or_version_is_refused(tmp_path, metadata):
    with pytest.raises(DataError, match="the file holds"):
        Statistics.load(rewritten(tmp_path, lambda tensors: None, metadata))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("down/mean"),
        lambda t: t.pop("down/minimum"),
        lambda t: t.update({"down/median": torch.zeros(CHANNELS)}),
        lambda t: t.update({"down/maximum": torch.zeros(CHANNELS + 1)}),
        lambda t: t.update({"down/mean": torch.zeros(CHANNELS)}),
        lambda t: t.update({"down/gram": torch.zeros(CHANNELS)}),
        lambda t: t.update({"down/count": torch.zeros(2, dtype=torch.int64)}),
        lambda t: t.update({"down/top": torch.zeros(CHANNELS, dtype=torch.int32)}),
    ],
)
def test_incomplete_or_misshapen_sites_are_refused_by_name(tmp_path, change):
    with pytest.raises(DataError, match="where: down in "):
        Statistics.load(rewritten(tmp_path, change))


def test_a_file_without_site_names_is_refused(tmp_path):
    with pytest.raises(DataError):
        Statistics.load(rewritten(tmp_path, lambda t: t.update({"stray": torch.zeros(1)})))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("count", lambda x: -x),
        ("count", lambda x: x + 1),
        ("mean", lambda x: x * torch.nan),
        ("maximum", lambda x: x * torch.inf),
        ("gram", lambda x: x / 0),
        ("counts", lambda x: -x),
        ("counts", lambda x: x.roll(1, 0) * torch.tensor([[2], [0], [1], [1]], dtype=x.dtype)),
        ("top", lambda x: x + 1),
        ("top", lambda x: x * 0 + 2**31 - 1),
        ("magnitude", lambda x: -x),
        ("magnitude", lambda x: x * torch.inf),
    ],
)
def test_numbers_that_no_tokens_have_are_refused(tmp_path, name, change):
    file = tmp_path / "kept.safetensors"
    Statistics({"a": statistics_of(batch(0), gram=True)}).save(file)
    kept = load_file(file)
    kept[f"a/{name}"] = change(kept[f"a/{name}"]).contiguous()
    save_file(kept, file, FORMAT)
    with pytest.raises(DataError):
        Statistics.load(file)


def test_statistics_of_no_tokens_are_read(tmp_path):
    Statistics({"a": statistics_of()}).save(tmp_path / "kept.safetensors")
    assert Statistics.load(tmp_path / "kept.safetensors")["a"].count == 0
