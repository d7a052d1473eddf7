import pytest
import torch

from ir import edit
from ir.capture import capture
from ir.evaluate import run as run_graph
from passes.pruning.kinds import KINDS
from passes.pruning.prunable import found_units
from passes.pruning.unit_scores import CRITERIA
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, context, run, vectors


def prepared():
    torch.manual_seed(0)
    gm = capture(Mlp().requires_grad_(False), (vectors(rows=64),))
    run(gm, "canonicalize")
    return gm, context(gm, [(vectors(seed, rows=512),) for seed in range(4)])


def scores(gm, ctx, name, tokens=100_000):
    units, _ = found_units(gm, KINDS, ())
    return CRITERIA[name].scores(gm, ctx, units, tokens, 0)


def test_magnitude_is_the_product_of_norms():
    gm, ctx = prepared()
    found = {str(node.target): edit.attribute(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    made = torch.cat([found["up.weight"], found["up.bias"][:, None]], 1).norm(dim=1)
    (score,) = scores(gm, ctx, "magnitude")
    assert torch.allclose(score, made * found["down.weight"].norm(dim=0))


@pytest.mark.parametrize(("name", "tolerance"), [("wanda", 1e-4), ("fisher", 0.35)])
def test_scores_say_what_dropping_one_unit_costs(name, tolerance):
    """Outputs count as means of normal distributions: half the squared error is the divergence."""
    gm, ctx = prepared()
    (score,) = scores(gm, ctx, name)
    x = torch.cat([batch[0] for batch in ctx.calibration])
    (exact,) = run_graph(gm, [x])
    down = next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == "down.weight")
    whole, errors = edit.attribute(gm, down).detach(), []
    for unit in range(0, 128, 16):
        weight = whole.clone()
        weight[:, unit] = 0
        edit.store(gm, "down.weight", weight)
        (found,) = run_graph(gm, [x])
        errors.append((found - exact).square().sum(1).mean())
    expected = torch.stack(errors)
    expected = expected.sqrt() if name == "wanda" else 0.5 * expected
    assert ((score[::16] - expected).abs() <= tolerance * expected).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_heads_and_channels_have_scores_that_are_drawn_the_same_way_twice(name):
    gm = load("llama").graph()
    run(gm, "canonicalize")
    first, second = (scores(gm, context(gm, CALIBRATION), name) for _ in range(2))
    assert [len(score) for score in first] == [2, 96, 2, 96]
    assert all(torch.equal(a, b) and (a > 0).all() for a, b in zip(first, second, strict=True))
