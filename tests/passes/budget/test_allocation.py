import pytest

from ir.sites import layers, readers
from ir.weights import stored_bits
from passes.budget.allocation import Problem, formed, refusal, stored, weights_in
from passes.budget.forms import Form
from tests.families import load
from tests.passes.samples import context, run

MARKS = [Form.parse(f"u{bits}[1,-1]") for bits in (2, 4)]


@pytest.fixture(scope="module")
def problem():
    sites = [found for found in readers(load("llama").graph()).values() if found[0].path.endswith("_proj")]
    costs = {(layer.path, str(mark)): 8.0 - mark.weight.bits for site in sites for layer in site for mark in MARKS}
    return Problem(sites, [[(mark,) * len(site) for mark in MARKS] for site in sites], costs, 10**9)


def test_sizes_and_weights_are_those_of_all_layers_of_a_site(problem):
    site = problem.sites[0]
    shapes = [tuple(layer.weight.meta["val"].shape) for layer in site]
    assert len(shapes) == 3
    assert stored(site, (MARKS[0],) * 3) == sum(stored_bits(shape, MARKS[0].weight) for shape in shapes)
    assert weights_in(site) == sum(rows * columns for rows, columns in shapes)
    assert problem.weights == sum(map(weights_in, problem.sites))


def test_a_choice_counts_costs_as_predicted_whatever_corrects_them(problem):
    made = problem.solve([3.0] * len(problem.sites))
    assert made.choice.cost == pytest.approx(3 * made.cost)
    assert made.cost == pytest.approx(sum(made.costs)) == 14 * 4.0
    assert made.bits == made.choice.size / problem.weights


def test_a_factor_moves_bits_to_a_site(problem):
    sizes = [stored(site, own[0]) for site, own in zip(problem.sites, problem.options, strict=True)]
    room = stored(problem.sites[1], problem.options[1][1]) - sizes[1]  # to widen the second site alone, or another one
    tight = Problem(problem.sites, problem.options, problem.costs, sum(sizes) + room)
    assert tight.solve([1e-3, 1e3] + [1e-3] * (len(sizes) - 2)).taken[1] == problem.options[1][1]


def test_sites_can_be_left_out(problem):
    made = problem.solve()
    assert len(made.forms()) == 14
    assert set(made.forms()) - set(made.forms([0, 1])) == {*problem.sites[0], *problem.sites[1]}


@pytest.mark.parametrize(
    ("scheme", "width", "group", "expected"),
    [
        ("W4A16", 3, None, "i3[1,32]"),
        ("W4A16", "W4A8", None, "i4[1,32]/i8[1,-1]dynamic"),
        ("W4A4", 3, -1, "i3[1,-1]/i4[1,-1]dynamic"),
        ("W4A4", "W8A16", 16, "i8[1,16]"),
    ],
)
def test_a_width_of_the_weight_leaves_the_input_and_a_scheme_changes_both(scheme, width, group, expected):
    gm = load("llama").graph()
    run(gm, f"canonicalize, annotate(scheme={scheme!r}, group=32)")
    layer = next(layer for layer in layers(gm) if layer.path.endswith("q_proj"))
    assert str(formed(layer, width, group)) == expected


def test_the_target_judges_the_pair():
    class Narrow:
        name = "narrow"

        def supports(self, kind, encodings, shape):
            return " ".join(f"{name}={encoding.bits}" for name, encoding in encodings.items())

    gm = load("llama").graph()
    ctx = context(gm)
    layer = layers(gm)[1]
    assert refusal(ctx, layer, Form.parse("i4[1,-1]/i8[1,-1]dynamic")) is None
    ctx.backend = Narrow()
    assert refusal(ctx, layer, Form.parse("i4[1,-1]/i8[1,-1]dynamic")) == "input=8 weight=4"
    assert refusal(ctx, layer, Form.parse("i4[1,-1]")) == "weight=4"
