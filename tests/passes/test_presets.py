import pytest
import torch
import transformers

import passes
from ir import edit
from ir.capture import capture
from ir.encoding import Encoding
from ir.errors import OptionError
from ir.ops import DEQUANTIZE, QUANTIZE
from ir.sites import Mark, layers
from passes import presets, registry
from passes.pipeline import Pipeline
from passes.probe import relative_error
from passes.transforms import TRANSFORMS
from tests.families import FAMILIES, LAYERS, load
from tests.passes.samples import compiled, tokens

VARIANTS = [
    *presets.ROUNDING,
    *presets.TRANSFORMING,
    "mixed(bits=2.5, steps=5)",
    "mixed(bytes=110_000, rounding='gptq')",
    "mixed(bits=5.6, widths=('W4A4', 'W8A8'), steps=5, cache=5.0, cache_widths=(2, 4, 8))",
    "mixed(bits=5.6, widths=('W4A8', 'W8A16'), groups=(-1,), rounding='gptq', transform='none')",
    "mixed(bits=5.6, widths=('W4A8', 'W8A8'), rounding='nearest', own_text=False)",
    "w8a8(dynamic=False)",
    "w8a8(dynamic=False, quantile=0.999)",
    "w8a8(rounding='gptq')",
    "w4a16(group=-1, symmetric=True, rounding='nearest')",
    "w4a16(head=True, embeddings=True)",
    "w4a16(ignore=['down_proj'])",
    *(f"w4a4(transform='{name}')" for name in TRANSFORMS if name != "balance"),  # the default
    "w8a8(transform='rotate', dynamic=False, cache=8)",
    "rotate(where=['R1', 'R3'], kind='orthogonal')",
    "smooth(mean=True, search=True)",
    "smoothrot(search=True)",
]


@pytest.mark.parametrize("text", VARIANTS)
def test_a_preset_is_a_pipeline_that_prints_as_one(text):
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert str(pipeline).startswith("canonicalize, ")


ROUNDING = [*presets.ROUNDING, "mixed(bits=2.5, steps=5)", "mixed(bits=3, rounding='gptq', transform='none')"]


@pytest.mark.parametrize("name", ROUNDING)
def test_a_preset_covers_every_linear_but_the_head(name):
    made = compiled("llama", name)
    weights = sum(module.weight.numel() for path, module in load("llama").model.named_modules() if path.endswith("_proj"))
    assert made.report().coverage.elements == weights
    assert {skip.path for skip in made.report().skipped} == {"lm_head", "model.embed_tokens"}
    assert 0 < made.report().difference < (0.5 if name in {"w8a8", "w8a16", "w4a16", "w3a16", "w4a8"} else 1)


@pytest.mark.parametrize("text", [text for text in VARIANTS if "(" in text and text.startswith(("w", "mixed"))])
def test_options_of_presets_run(text):
    coverage = compiled("llama_tied", text).report().coverage
    assert coverage.elements > 0
    assert torch.isfinite(torch.tensor(compiled("llama_tied", text).report().difference))


@pytest.mark.parametrize("text", [text for text in VARIANTS if text.startswith(tuple(presets.TRANSFORMING))])
def test_transforms_alone_keep_the_function(text):
    made = compiled("llama_tied", text)
    assert made.report().difference < 1e-5
    assert made.coverage == 0


@pytest.mark.parametrize("preset", [presets.w4a4, presets.mixed])
def test_an_unknown_transform_is_refused(preset):
    with pytest.raises(OptionError, match="no transform 'fourier'"):
        preset(transform="fourier")


def test_masks_take_the_place_of_the_knapsack():
    names = [step.name() for step in presets.mixed(bits=1.7, widths=(4, 1), solver="masks")]
    assert "learn_masks" in names
    assert "assign_bits" not in names
    assert "fit_masks" in [step.name() for step in presets.mixed(memory=0.1, widths=(1, 4), solver="masks", prune=True)]
    for options in ({"solver": "masks"}, {"solver": "luck"}, {"solver": "masks", "widths": (1, 4), "bytes": 10}):
        with pytest.raises(OptionError):
            presets.mixed(**options)


@pytest.mark.parametrize("rounding", ["learned", "gptq"])
def test_activations_are_really_rounded_to_the_widths_that_were_chosen(rounding):
    text = f"mixed(bits=5.6, widths=('W4A4', 'W8A8'), groups=(-1, 16), rounding={rounding!r}, steps=5, own_text=False)"
    made = compiled("llama", text)
    marks = [Mark.parse(row["encoding"]) for row in made.report().tables["widths"]]
    assert {(mark.weight.bits, mark.input.bits) for mark in marks} == {(4, 4), (8, 8)}
    own = [layer for layer in layers(made.graph) if layer.path.endswith("_proj")]
    rounded = [layer.site("input").operand for layer in own]
    assert all(node.target is DEQUANTIZE and node.args[0].target is QUANTIZE for node in rounded)
    assert [Encoding.parse(node.args[3]).bits for node in rounded] == [mark.input.bits for mark in marks]
    assert any(Encoding.parse(node.args[3]).clip < 1 for node in rounded)
    assert [Encoding.parse(layer.weight.args[3]).bits for layer in own] == [mark.weight.bits for mark in marks]
    assert len({*rounded}) < len(rounded)  # what q, k and v read is rounded once
    assert made.effective_bits <= 5.6


def test_widths_of_mixed_are_all_numbers_or_all_schemes():
    for options in ({"widths": (2, "W4A4")}, {"widths": ("W4A4", "W8A8"), "solver": "masks"}, {"widths": ("W4A5",)}):
        with pytest.raises(OptionError) as error:
            presets.mixed(**options)
        assert error.value.remedy
    steps = [step.name() for step in presets.mixed(widths=("W4A16", "W8A16"))]
    assert "quantize" not in steps and "clip_activations" not in steps


def test_ready_made_presets_are_spread_into_pipelines():
    assert (registry.presets()["w4a16"](), registry.presets()["w8a8"]()) == (presets.W4A16, presets.W8A8)
    assert [step.name() for step in presets.W8A16] == ["canonicalize", "annotate", "round_weights"]
    assert Pipeline.of([passes.Pipeline.parse("fold_norm"), *presets.W4A16]).passes[1:] == presets.W4A16.passes


def test_one_name_is_not_a_list_of_letters():
    with pytest.raises(OptionError, match="list of strings"):
        presets.w4a16(ignore="lm_head")


def as_initialized(family, dtype=torch.float32):
    """The captured graph with matrices of the size that `transformers` initialises them with: `build` makes them four times as large."""
    gm = load(family, dtype).graph()
    for node in gm.graph.find_nodes(op="get_attr"):
        if (tensor := edit.attribute(gm, node)).ndim > 1 and tensor.is_floating_point():
            edit.set_attribute(gm, node, tensor / 4)
    return gm


# A norm after attention and MLP scales their error, 0.5 % for every linear on the way, up to the size of the residual stream.
POST_NORM = {"gemma2", "gemma3", "olmo2"}


@pytest.mark.parametrize(("family", "dtype"), [*((name, torch.float32) for name in FAMILIES), ("llama", torch.bfloat16)])
def test_w8a16_is_near_lossless(family, dtype):
    gm = as_initialized(family, dtype)
    made = passes.compile(gm, "w8a16")
    limit = 0.02 if family in POST_NORM else 0.01
    before, after = load(family, dtype).steps(gm), load(family, dtype).steps(made.graph)
    assert made.report().coverage.elements > LAYERS * 64 * 64
    assert all(relative_error((a,), (b,)) < limit for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("family", ["gemma3", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("gemma2", "olmo2"))])
def test_w8a16_by_gptq_is_near_lossless_after_post_norms_too(family):
    torch.manual_seed(0)
    gm = capture(transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval())
    made = passes.compile(gm, "w8a16(rounding='gptq', symmetric=False, group=16)", [tokens(8, 64, seed) for seed in range(10, 14)])
    before, after = load(family).steps(gm), load(family).steps(made.graph)
    assert all(relative_error((a,), (b,)) < 0.01 for a, b in zip(after, before, strict=True))


def test_calibrated_presets_refuse_to_run_without_data():
    for text in ("w4a16", "w8a8(dynamic=False)"):
        with pytest.raises(passes.FxpressError, match="needs calibration data"):
            passes.compile(load("llama").captured, text)
