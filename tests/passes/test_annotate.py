from dataclasses import replace

import pytest

from ir.capture import capture
from ir.errors import CoverageError, OptionError
from ir.schemes import SCHEMES
from ir.sites import layers
from passes.annotate import Annotate
from passes.canonicalize import Canonicalize
from tests.families import LAYERS, load
from tests.passes.samples import Mlp, run, vectors

HEAD, EMBEDDING, LINEARS = "lm_head", "model.embed_tokens", 7 * LAYERS


def annotated(*steps, family="llama"):
    gm = load(family).graph()
    _, ctx = run(gm, steps)
    marks = {}
    for layer in layers(gm):
        weight = layer.site("weight").encoding
        value = layer.site("input").encoding if layer.kind == "Linear" else None
        if weight is not None:
            marks[layer.path] = (str(weight), "" if value is None else str(value))
    return marks, ctx


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_states_the_bits_of_weights_and_activations(scheme):
    weights, activations = SCHEMES[scheme]
    step = Annotate(scheme)
    assert step.weights.bits == weights
    assert (16 if step.activations is None else step.activations.bits) == activations
    marks, _ = annotated(step)
    assert len(marks) == LINEARS
    assert len(set(marks.values())) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("i8[1,-1]", "i8[1,-1]dynamic")),
        ({"dynamic": False}, ("i8[1,-1]", "u8[-1]")),
        ({"scheme": "W4A16", "group": 64, "symmetric": False}, ("u4[1,64]", "")),
        ({"scheme": "W4A16", "group": 32}, ("i4[1,32]", "")),
        ({"scheme": "W1A16", "group": 128}, ("i1[1,128]", "")),
    ],
)
def test_options_decide_the_encodings(options, expected):
    marks, _ = annotated(Annotate(**options))
    assert set(marks.values()) == {expected}


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ({"targets": ["q_proj"]}, LAYERS),
        ({"targets": ["q_proj", "k_proj"]}, 2 * LAYERS),
        ({"targets": ["re:.*mlp"]}, 3 * LAYERS),
        ({"targets": ["model.layers.0.mlp.up_proj"]}, 1),
        ({"ignore": ["down_proj"]}, LINEARS - LAYERS),
        ({"ignore": [r"re:model\.layers\.0\."]}, LINEARS // 2),
        ({"targets": ["re:.*mlp"], "ignore": ["up_proj"]}, 2 * LAYERS),
        ({"head": True}, LINEARS + 1),
        ({"embeddings": True}, LINEARS + 1),
        ({"head": True, "embeddings": True}, LINEARS + 2),
        ({"head": True, "ignore": ["lm_head"]}, LINEARS),
    ],
)
def test_patterns_choose_the_layers(options, covered):
    marks, ctx = annotated(Annotate(**options))
    assert len(marks) == covered
    assert {skip.path for skip in ctx.skipped}.isdisjoint(marks)
    assert len(ctx.skipped) + covered == LINEARS + 2


def test_an_embedding_is_annotated_as_the_head_that_it_is_tied_to():
    option = Annotate("W4A16", group=32, head=True, embeddings=True)
    assert annotated(option, family="llama_tied")[0][EMBEDDING] == ("i4[1,32]", "")
    assert annotated(option, family="llama")[0][EMBEDDING] == ("i4[1,-1]", "")
    assert annotated(replace(option, head=False), family="llama_tied")[0][EMBEDDING] == ("i4[1,-1]", "")


def test_an_embedding_has_one_scale_per_row_and_no_input():
    marks, _ = annotated(Annotate("W4A8", group=-1, embeddings=True))
    assert marks[EMBEDDING] == ("i4[1,-1]", "")


def test_what_is_left_out_is_recorded_with_a_reason_and_its_size():
    _, ctx = annotated(Annotate(ignore=("down_proj",), targets=("re:.*mlp",)))
    skips = {skip.path: skip for skip in ctx.skipped}
    assert "head=True" in skips[HEAD].reason
    assert "embeddings=True" in skips[EMBEDDING].reason
    assert skips["model.layers.0.mlp.down_proj"].reason == "ignored by the recipe"
    assert skips["model.layers.0.self_attn.q_proj"].reason == "not among the targets of the recipe"
    assert skips[HEAD].bytes == 128 * 64 * 4


def test_a_second_scheme_takes_over_the_layers_it_names():
    marks, ctx = annotated(Annotate("W4A16", group=32), Annotate("W8A8", targets=("down_proj",)))
    assert marks["model.layers.0.mlp.down_proj"] == ("i8[1,-1]", "i8[1,-1]dynamic")
    assert marks["model.layers.0.mlp.up_proj"] == ("i4[1,32]", "")
    assert {skip.path for skip in ctx.skipped} == {HEAD, EMBEDDING}


@pytest.mark.parametrize("option", ["ignore", "targets"])
@pytest.mark.parametrize("pattern", ["down_porj", "re:.*conv", "linear", "", "re:("])
def test_a_pattern_that_matches_nothing_is_refused(option, pattern):
    with pytest.raises(OptionError, match=r"matches no layer|not a regular expression"):
        annotated(Annotate(**{option: (pattern,)}))


@pytest.mark.parametrize("options", [{"ignore": ("Linear",)}, {"targets": ("lm_head",)}, {"targets": ("Embedding",)}])
def test_a_recipe_that_would_cover_nothing_is_refused(options):
    with pytest.raises(CoverageError, match="would cover nothing: "):
        annotated(Annotate(**options))


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2"])
def test_heads_are_found_without_names(family):
    _, ctx = annotated(Canonicalize(), Annotate(), family=family)
    assert sum("head=True" in skip.reason for skip in ctx.skipped) == 1


def test_a_model_without_embeddings_has_no_head():
    gm = capture(Mlp(), args=(vectors(),))
    (record,), _ = run(gm, "annotate")
    assert (record.sites, record.skipped) == (2, ())
