import pytest
import torch

from ir import edit
from ir.errors import DataError, OptionError
from passes.smooth_channels import SmoothChannels
from tests.families import load
from tests.passes.maps import DECODERS, OPENED, kept
from tests.passes.samples import run


@pytest.mark.parametrize("family", DECODERS)
def test_smoothing_keeps_the_function(family):
    _, records, ctx, error = kept(family, f"{OPENED}, smooth_channels(quantile=0.99)")
    assert records[-1].sites == (6 if family in {"gpt2", "gpt_neox"} else 8)
    assert error < 1e-4
    if family in {"gpt2", "gpt_neox"}:
        assert any("gelu" in note and "is not linear" in note for note in ctx.notes)


@pytest.mark.parametrize(("where", "sites"), [("['norm']", 4), ("['mlp']", 2), ("['values']", 2)])
def test_where_chooses(where, sites):
    _, records, _, error = kept("llama", f"{OPENED}, smooth_channels(where={where})")
    assert records[-1].sites == sites
    assert error < 1e-5


def weight(gm, name):
    return edit.attribute(gm, next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == name))


def test_alpha_one_makes_activations_equal_and_alpha_zero_weights():
    columns = {}
    for alpha in (0.0, 1.0):
        gm, _, ctx, _ = kept("llama", f"{OPENED}, observe, smooth_channels(alpha={alpha}, where=['mlp'])")
        columns[alpha] = weight(gm, "model.layers.0.mlp.down_proj.weight").abs().amax(0)
        _, ctx = run(gm, "observe", ctx=ctx)
        columns[f"x{alpha}"] = ctx.statistics["model.layers.0.mlp.down_proj"].absmax
    for even in (columns[0.0], columns["x1.0"]):
        torch.testing.assert_close(even, torch.full_like(even, float(even.mean())), rtol=1e-4, atol=0)


def test_smoothing_by_s_then_by_one_over_s_restores(monkeypatch):
    gm = load("llama").graph()
    run(gm, OPENED)
    before = {node.target: edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    from ir import maps
    from ir.channels import Map, channel_groups

    for sign in (1, -1):
        for group in channel_groups(gm, Map.SCALE):
            if not group.reason:
                generator = torch.Generator().manual_seed(group.size)
                maps.apply(gm, group, (sign * torch.randn(group.size, generator=generator, dtype=torch.float64)).exp())
    for name, old in before.items():
        torch.testing.assert_close(weight(gm, name), old, rtol=1e-5, atol=1e-6)


def test_a_search_does_no_worse_than_the_fixed_policy():
    found = {}
    for options in ("", ", search=True"):
        gm, _, ctx, error = kept("llama", f"{OPENED}, annotate(scheme='W4A4'), smooth_channels(where=['mlp']{options})")
        assert error < 1e-5
        records, _ = run(gm, "quantize", ctx=ctx)
        found[options] = records[-1].difference
    assert found[", search=True"] < 1.1 * found[""]


def test_it_needs_statistics_or_data():
    with pytest.raises(DataError, match="calibration data"):
        run(load("llama").graph(), f"{OPENED}, smooth_channels")


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"quantile": 0.0}, {"where": ("head",)}])
def test_bad_options_are_refused(options):
    with pytest.raises(OptionError):
        SmoothChannels(**options)
