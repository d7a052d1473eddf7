from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import passes
from ir import edit
from ir.errors import CoverageError, DataError, OptionError
from ir.match import aten
from ir.sites import layers
from ir.text import graph_text
from tests.families import build, load
from tests.passes.samples import CALIBRATION, Mlp, compiled, same_weights, tokens, vectors


def test_a_hugging_face_model_is_called_like_itself():
    model = load("llama").model
    made = passes.compile(model, "canonicalize")
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(input_ids=ids)
    found = made(input_ids=ids)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(made(ids, attention_mask=mask).logits[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-4)


class Two(nn.Module):
    """Two inputs, and one of them is called as tokens are."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(16, 64), nn.Linear(64, 64)

    def forward(self, input_ids, scale):
        return self.linear(self.table(input_ids)) * scale


def test_a_module_with_args_returns_a_tensor():
    model = Mlp()
    made = passes.compile(model, "w8a8", args=(vectors(),))
    torch.testing.assert_close(made(vectors(5, 3)), model(vectors(5, 3)), rtol=0.05, atol=0.05)
    assert made.coverage > 0.9


@pytest.mark.parametrize("positional", [0, 1, 2])
def test_a_module_with_args_and_kwargs(positional):
    inputs = {"input_ids": torch.randint(16, (4, 6)), "scale": torch.rand(4, 6, 1)}
    values, names = list(inputs.values()), list(inputs)
    made = passes.compile(
        Two(),
        "w8a8(dynamic=False)",
        [inputs],
        args=values[:positional] or None,
        kwargs={name: inputs[name] for name in names[positional:]} or None,
    )
    assert made(*values[:positional], **{name: inputs[name] for name in names[positional:]}).shape == (4, 6, 64)


def test_a_captured_graph_is_left_as_it_was():
    captured = load("llama").captured
    text = graph_text(captured)
    made = passes.compile(captured, "w8a16")
    assert graph_text(captured) == text
    assert made.graph is not captured


def test_what_passes_make_is_kept_on_disk_where_that_is_asked_for(tmp_path):
    model, text = load("llama").model, "canonicalize, untie, fold_norm, center_norm, rotate_channels, annotate(scheme='W8A16')"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, kept = (passes.compile(model, text, CALIBRATION, scratch=scratch) for scratch in (None, tmp_path))
    store = kept.graph.meta[edit.STORE]
    made = [edit.attribute(kept.graph, layer.weight) for layer in layers(kept.graph)]
    assert sum(map(store.holds, made)) > 10 and not any(store.holds(tensor) for tensor in model.parameters())
    assert same_weights(plain.graph, kept.graph) and edit.STORE not in plain.graph.meta
    assert not list(tmp_path.iterdir())  # its files have no name
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(DataError, match="no such folder"):
        passes.compile(model, text, CALIBRATION, scratch=tmp_path / "elsewhere")


@dataclass(frozen=True)
class DropTanh(passes.Pass):
    """Drop the hyperbolic tangent, nearly the identity where inputs are small."""

    effect: ClassVar[passes.Effect] = passes.Effect.CHANGE

    def run(self, gm, ctx):
        nodes = passes.find(gm, aten.relu.default)
        for node in nodes:
            passes.replace(node, passes.emit(gm, aten.tanh.default, (node.args[0],), before=node))
        return len(nodes)


def test_a_pass_of_ones_own_needs_no_registration():
    made = passes.compile(Mlp(), [DropTanh(), *passes.presets.W8A16], args=(vectors(),))
    assert made.trace[0].text == "drop_tanh"
    assert made.trace[0].sites == 1


def test_replaying_a_recipe_gives_the_same_bits():
    first = compiled("llama", "w4a16")
    recipe = first._recipe
    again = passes.compile(load("llama").captured, recipe, CALIBRATION)
    assert again._recipe == recipe
    assert graph_text(again.graph) == graph_text(first.graph)
    assert same_weights(again.graph, first.graph)


def test_a_recipe_brings_its_backend():
    with pytest.raises(OptionError, match="no backend 'elsewhere'"):
        passes.compile(load("llama").captured, compiled("llama", "w4a16")._recipe.model_copy(update={"backend": "elsewhere"}), CALIBRATION)


@pytest.mark.parametrize(
    ("family", "calibration", "message"),
    [
        ("llama_tied", CALIBRATION, "other weights"),
        ("llama", CALIBRATION[:1], "other calibration data"),
        ("llama", None, "other calibration data"),
    ],
)
def test_a_recipe_is_not_replayed_on_other_data(family, calibration, message):
    with pytest.raises(DataError, match=message):
        passes.compile(load(family).captured, compiled("llama", "w4a16")._recipe, calibration)


def test_a_weight_that_is_not_finite_is_named_before_any_long_work():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")

    def calibration():
        pytest.fail("the calibration data were read")
        yield

    with pytest.raises(DataError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has 1 values"):
        passes.compile(model, "w4a16", calibration())


@pytest.mark.parametrize(
    ("pipeline", "calibration", "kind", "message"),
    [
        ("", None, OptionError, "empty"),
        ([], None, OptionError, "empty"),
        ("w8a16x", None, OptionError, "w8a16"),
        ("w8a16(ignore=['no_such'])", None, OptionError, "matches no layer"),
        ("w8a16(ignore=['Linear'])", None, CoverageError, "would cover nothing"),
        ("w4a16", None, DataError, "needs calibration data"),
        ("w4a16", [], DataError, "calibration is empty"),
        ("w4a16", [tokens(1, 100)], DataError, "too few"),
        ("w4a16", [{"tokens": tokens()}], DataError, "unknown inputs"),
        ("w4a16", [tokens() + 1000], DataError, "cannot run on the calibration data"),
    ],
)
def test_bad_input_is_refused_by_its_kind(pipeline, calibration, kind, message):
    with pytest.raises(kind, match=message) as caught:
        passes.compile(load("llama").captured, pipeline, calibration)
    assert type(caught.value) is kind


def test_a_model_whose_outputs_are_not_finite_is_refused():
    model = Mlp()
    model.down.weight.data.fill_(3e38)
    with pytest.raises(DataError, match="own outputs on the example inputs are not finite"):
        passes.compile(model, "w8a16", args=(vectors(),))


def test_an_unknown_backend_is_refused():
    with pytest.raises(OptionError, match="no backend 'onxx'"):
        passes.compile(load("llama").captured, "w8a16", backend="onxx")


class Picky:
    """A backend without embeddings."""

    name = "picky"

    def supports(self, operator, encodings, shape):
        return "it has no 8-bit linears of 96 columns" if shape[1] == 96 else None

    def lower(self, gm, probe, notes):
        from backends.reference import ReferenceExecutable

        return ReferenceExecutable(gm)


def test_what_the_target_does_not_support_is_refused_or_left():
    with pytest.raises(CoverageError, match=r"picky backend cannot run model\.layers\.0\.mlp\.down_proj .*and 1 more layers"):
        passes.compile(load("llama").captured, "w8a16", backend=Picky())
    made = passes.compile(load("llama").captured, "w8a16", backend=Picky(), allow_partial=True)
    asked = [skip for skip in made.report().skipped if skip.asked]
    assert [skip.path for skip in asked] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert made.report().coverage.elements > 0
