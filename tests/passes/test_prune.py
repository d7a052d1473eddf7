import json

import pytest
import torch

import passes
from ir.errors import CoverageError, DataError, OptionError
from passes.measure import divergence
from passes.pipeline import Pipeline
from passes.probe import relative_error
from passes.prune import Prune
from passes.pruning.unit_scores import CRITERIA
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, compiled, run, same_weights, tokens, vectors

STEPS = (7, 1, 1)
PLAIN = "criterion='magnitude', compensate=False"
MANY = [{"input_ids": tokens(seed=seed)} for seed in range(12)]


def pruned(family, options, calibration=CALIBRATION, more=""):
    gm = load(family).graph()
    _, ctx = run(gm, f"canonicalize, prune({options}){more}", calibration)
    return gm, ctx


def kept(ctx):
    return {row["layer"]: row["kept"] for row in ctx.tables["pruned"]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bert"])  # all equal their twins in test_selection
def test_it_runs_on_with_what_is_left(family):
    gm, ctx = pruned(family, "share=0.3, multiple=2, tokens=64")
    assert all(torch.isfinite(logits).all() for logits in load(family).steps(gm, lengths=STEPS))
    assert abs(sum(row["of"] - row["kept"] for row in ctx.tables["pruned"]) / sum(row["of"] for row in ctx.tables["pruned"]) - 0.3) < 0.2
    assert any("of the weights of" in note for note in ctx.notes)


@pytest.mark.parametrize(
    ("options", "criterion", "kept_of"),
    [
        ("share=0.5, what=['query_heads']", "fisher", [(1, 2), (1, 2)]),
        ("share=0.5, what=['query_heads']", "wanda", [(1, 2), (1, 2)]),
        ("share=0.25, what=['inputs', 'outputs'], multiple=16, uniform=True", "fisher", [(48, 64)] * 8),
        ("share=0.2, what=['blocks']", "wanda", None),
        ("share=0.2, what=['blocks']", "magnitude", None),
    ],
)
def test_other_units_go_too(options, criterion, kept_of):
    gm, ctx = pruned("llama", f"{options}, criterion='{criterion}', tokens=64")
    rows = [(row["kept"], row["of"]) for row in ctx.tables["pruned"]]
    assert rows == kept_of if kept_of else sorted(rows) == [(0, 1), *[(1, 1)] * 3]
    assert all(torch.isfinite(logits).all() for logits in load("llama").steps(gm, lengths=STEPS))


def test_masks_are_a_criterion():
    _, ctx = pruned(
        "llama", "share=0.3, multiple=2, what=['mlp', 'query_heads'], criterion='masks', steps=2, uniform=False", more=", w4a16(group=-1)"
    )
    assert any("of the weights of 4 groups" in note for note in ctx.notes)
    with pytest.raises(OptionError):
        Prune(criterion="masks", steps=0)


def test_refitting_what_reads_some_dims_brings_it_nearer():
    exact, ids = compiled("llama", "canonicalize"), torch.cat([batch["input_ids"] for batch in MANY])
    pipeline = "canonicalize, prune(share=0.25, what=['inputs'], multiple=4, compensate={})"
    errors = [divergence(passes.compile(load("llama").captured, pipeline.format(on), MANY), exact, ids) for on in (False, True)]
    assert errors[1] < errors[0]


def test_a_vector_makes_up_for_the_mean_of_dims_that_are_not_written():
    exact, ids = compiled("gpt2", "canonicalize"), torch.cat([batch["input_ids"] for batch in MANY])
    pipeline = "canonicalize, prune(share=0.25, what=['outputs'], criterion='magnitude', bias={})"
    errors = [divergence(passes.compile(load("gpt2").captured, pipeline.format(on), MANY), exact, ids) for on in (False, True)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("options", ["", ", uniform=False"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_share_is_met(share, options):
    gm, _ = pruned("llama", f"share={share}, multiple=4, {PLAIN}{options}")
    before, after = (
        sum(tensor.numel() for name, tensor in graph.state_dict().items() if "_proj" in name) for graph in (load("llama").captured, gm)
    )
    assert abs(1 - after / before - share) < 0.01


def test_nothing_is_the_identity():
    gm, ctx = pruned("phi3", "share=0.0", None)
    same = load("phi3").graph()
    run(same, "canonicalize")
    assert same_weights(gm, same)
    assert ctx.tables == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_refitting_brings_every_criterion_nearer(family, criterion):
    exact, ids = compiled(family, "canonicalize"), torch.cat([batch["input_ids"] for batch in MANY])
    errors = [
        divergence(
            passes.compile(
                load(family).captured, f"canonicalize, prune(share=0.3, multiple=2, criterion='{criterion}', compensate={on})", MANY
            ),
            exact,
            ids,
        )
        for on in (False, True)
    ]
    assert errors[1] < errors[0]


def test_a_bias_makes_up_for_the_mean():
    model, x = Mlp().eval().requires_grad_(False), vectors(rows=512) + 1
    exact = model(x)
    errors = []
    for bias in (False, True):
        made = passes.compile(model, f"canonicalize, prune(share=0.5, criterion='magnitude', bias={bias})", [(x,)], args=(x,))
        assert ("down.bias" in made.graph.state_dict()) == bias
        errors.append(float((made(x) - exact).norm() / exact.norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", "prune(share=0.35, multiple=2, {})"),
        pytest.param("phi3", "prune(share=0.35, multiple=2, {})", marks=pytest.mark.thorough),
        (
            "llama",
            "prune(share=0.5, what=['query_heads'], {0}), prune(share=0.154, what=['blocks'], {0}), "
            "prune(share=0.25, what=['inputs', 'outputs'], {0})",
        ),
    ],
)
def test_onnx_runs_what_is_left(family, steps):
    pipeline = f"canonicalize, {steps.format(PLAIN)}"
    made = passes.compile(load(family).captured, pipeline, backend="onnx")
    oracle = made.lowered("reference")
    past = None, None
    for ids in (tokens(2, 6), tokens(2, 1), tokens(2, 1, seed=3)):
        first, second = (run(input_ids=ids, past_key_values=cache) for run, cache in zip((oracle, made), past, strict=True))
        assert relative_error((second.logits,), (first.logits,)) < 1e-5
        past = first.past_key_values, second.past_key_values
    assert past[1].layers[0].keys.shape[1] == kept_heads(oracle)
    assert len(past[1].layers) == oracle.signature.layers


def test_the_saved_folder_states_the_heads_that_are_left(tmp_path):
    made = passes.compile(load("llama").captured, f"canonicalize, prune(share=0.35, multiple=2, {PLAIN})", backend="onnx")
    decoder = json.loads((made.save(tmp_path / "out") / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 1, 16)


def kept_heads(made):
    return next(port.shape[1] for port in made.signature.inputs if port.cached)


@pytest.mark.parametrize(
    "more",
    [
        "w4a16(group=-1)",
        "fold_norm, rotate_channels, w4a4",
        "untie, annotate(scheme='W2A16', group=8, symmetric=False), round_weights, tune(steps=3)",
    ],
)
def test_it_composes_with_rounding(more):
    gm, _ = pruned("llama", "share=0.35, multiple=8", MANY, f", untie, {more}")
    assert all(torch.isfinite(logits).all() for logits in load("llama").steps(gm, lengths=STEPS))


def test_layers_can_be_ignored_and_bfloat16_stays():
    gm = load("llama", torch.bfloat16).graph()
    _, ctx = run(gm, f"canonicalize, prune(share=0.25, what=['mlp'], ignore=['re:.*layers.0.*'], {PLAIN})")
    assert kept(ctx) == {"model.layers.1.mlp.down_proj": 72}
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in gm.state_dict().items() if "_proj" in name)
    assert any("they are ignored" in note for note in ctx.notes)


def test_what_cannot_be_pruned_is_noted_with_its_share():
    _, ctx = pruned("olmo2", f"share=0.25, {PLAIN}", None)
    note, *_ = [note for note in ctx.notes if "left out" in note]
    assert "self_attn.q_proj and" in note
    assert "% of the weight bytes: the norm" in note


def test_a_share_that_cannot_be_met_is_refused_unless_part_may_be_left():
    options = f"prune(share=0.3, what=['heads'], {PLAIN})"
    with pytest.raises(CoverageError, match=r"the nearest is 50\.0%"):
        passes.compile(load("llama").captured, f"canonicalize, {options}")
    made = passes.compile(load("llama").captured, f"canonicalize, {options}", allow_partial=True)
    assert kept_heads(made) == 1
    with pytest.raises(CoverageError, match=r"the nearest is 0\.0%"):
        passes.compile(load("olmo2").captured, f"canonicalize, {options}")


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        pruned("llama", "", None)
    with pytest.raises(DataError, match="calibration"):
        pruned("llama", "criterion='magnitude'", None)
    with pytest.raises(OptionError, match="before annotate"):
        run(load("llama").graph(), f"canonicalize, annotate(scheme='W4A16'), prune({PLAIN})")
    with pytest.raises(OptionError, match="matches no layer"):
        pruned("llama", f"ignore=['nothing'], {PLAIN}")
    for options in (
        {"share": 1.0},
        {"share": -0.1},
        {"what": ("cats",)},
        {"what": ("mlp", "inputs")},
        {"criterion": "measured"},
        {"rate": 0.0},
        {"criterion": "luck"},
        {"multiple": 0},
        {"damping": -1.0},
    ):
        with pytest.raises(OptionError):
            Prune(**options)


def test_it_prints_as_text_that_parses_to_itself():
    step = Prune(share=0.4, what=("mlp",), uniform=False, criterion="wanda", ignore=("q_proj",))
    assert Pipeline.parse(str(step)).passes == (step,)
