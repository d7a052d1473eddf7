import pytest
import torch

from ir.knapsack import Option
from ir.sites import layers, readers
from passes.budget.forms import Form
from passes.budget.linked import LIMIT, cuts_of, link, options
from passes.pruning.kinds import KINDS
from passes.pruning.prunable import found_units
from tests.families import load
from tests.passes.samples import run


def parts(family="llama", counts=None):
    gm = load(family).graph()
    run(gm, "canonicalize")
    sites = [[layer for layer in found if layer.path.split(".")[-1] != "lm_head"] for found in readers(gm).values()]
    sites = [site for site in sites if site]
    units, _ = found_units(gm, KINDS, ())
    kept = [counts or [own.size, own.size // 2] for own in units]
    scores = [torch.arange(own.size).float() for own in units]
    return gm, sites, units, link(sites, units, kept, scores)


def test_sites_that_units_run_through_are_one():
    _, sites, units, linked = parts()
    assert len(sites) == 8 and len(units) == len(linked) == 4
    names = [[layer.path.split(".")[-1] for layer in own.layers] for own in linked[:2]]
    assert names == [["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]]


def test_ways_say_shapes_and_what_stays():
    *_, linked = parts()
    mlp = linked[1]
    whole, half = mlp.ways
    assert mlp.shapes(whole) == {}
    assert [shape for _, shape in sorted(mlp.shapes(half).items(), key=lambda item: item[0].path)] == [(64, 48), (48, 64), (48, 64)]
    cuts = cuts_of(linked, 0.01)
    form = Form.parse("u4[1,32] 64x48")
    columns = cuts.columns(mlp.layers[2], form)
    assert columns[48:].all() and not columns[:48].any()  # the greatest scores
    assert cuts.rows(mlp.layers[2], form) is None
    forms = tuple(Form.parse(f"u4[1,32] {rows}x{columns}") for rows, columns in ((48, 64), (48, 64), (64, 48)))
    assert mlp.way_of(forms) == half
    assert mlp.way_of((Form.parse("u4[1,32]"),) * 3) == whole


def test_options_that_another_beats_are_left_out():
    *_, linked = parts()
    whole = [Form.parse(f"u{bits}[1,32]") for bits in (2, 4)]

    def weigh(site, forms):
        return Option(sum(8.0 / form.weight.bits + (form.shape is not None) for form in forms), sum(form.weight.bits for form in forms))

    made = options(
        linked[1], lambda site, shapes: [tuple(form._replace(shape=shapes.get(layer)) for layer in site) for form in whole], weigh
    )
    assert made and all(form.shape is None for forms in made for form in forms)  # smaller ones cost more, and here take as much


def test_units_that_leave_too_many_ways_are_not_linked():
    *_, linked = parts(counts=list(range(1, LIMIT + 2)))
    assert len(linked) == 8 and not any(own.units for own in linked)
    assert [list(own.ways) for own in linked] == [[()]] * 8


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_fused_projections_are_linked_too(family):
    _, _, units, linked = parts(family)
    assert sum(len(own.units) for own in linked) == len(units) > 0
    for own in linked:
        assert layers and all(len(own.shapes(way)) == len(own.layers) for way in list(own.ways)[1:])
