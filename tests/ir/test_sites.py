import pytest

from ir.encoding import Encoding
from ir.errors import OptionError
from ir.sites import Mark, check_patterns, heads, layers, matches, readers
from tests.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_found_without_its_name(families, name):
    gm = families(name).graph()
    assert [layer.path for layer in layers(gm) if layer.node in heads(gm)] in (["lm_head"], ["embed_out"], ["cls.predictions.decoder"])


def test_layers_go_by_their_modules_paths(families):
    paths = [layer.path for layer in layers(families("llama").graph())]
    assert paths[:3] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(set(paths)) == len(paths) == 16


@pytest.mark.parametrize("text", ["u4[1,64]", "i4[1,-1]/i8[1,-1]dynamic*0.9", "i8[1,-1]/u8[-1]"])
def test_the_text_of_a_mark_has_an_exact_inverse(families, text):
    mark = Mark.parse(text)
    assert str(mark) == text and (mark.input is None) == ("/" not in text)
    layer = layers(families("llama").graph())[1]
    layer.annotate(mark)
    assert layer.mark == mark
    assert not layer.input_rounded


@pytest.mark.parametrize("text", ["", "u4[1,64]/", "/i8[1,-1]", "u4[1,64]/x"])
def test_what_is_no_mark_is_refused(text):
    with pytest.raises(OptionError, match="not an encoding"):
        Mark.parse(text)


def test_layers_that_read_one_tensor_are_found(families):
    groups = [[layer.path.rpartition(".")[2] for layer in found] for found in readers(families("llama").graph()).values()]
    assert groups[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("Linear", True),
        ("q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("re:.*attn.*", True),
        ("Embedding", False),
        ("proj", False),
        ("re:q_proj", False),
    ],
)
def test_patterns_name_classes_paths_and_last_components(families, pattern, hit):
    assert matches(layers(families("llama").graph())[1], pattern) is hit


@pytest.mark.parametrize("pattern", ["lm_haed", "re:nothing", "re:("])
def test_patterns_that_match_nothing_are_refused(families, pattern):
    with pytest.raises(OptionError):
        check_patterns([pattern], layers(families("llama").graph()), "annotate(ignore=...)")


def test_annotations_live_in_custom_metadata(families):
    layer = layers(families("llama").graph())[1]
    layer.site("weight").annotate(Encoding.parse("u4[1,64]"))
    layer.site("input").annotate(Encoding.parse("i8[1,-1]dynamic"))
    assert layer.node.meta["custom"]["fxpress"] == {"weight": "u4[1,64]", "input": "i8[1,-1]dynamic"}
    layer.site("input").annotate(None)
    assert layer.site("input").encoding is None
    assert str(layer.site("weight").encoding) == "u4[1,64]"
