"""Transformed graphs in ONNX Runtime: rotations, block transforms and clips that are computed online follow the oracle."""

import pytest
import torch

import passes
from tests.families import load
from tests.passes.samples import CALIBRATION, tokens


def errors(family, pipeline):
    """Of ONNX Runtime's logits, element by element over the greatest of the oracle's, for a prompt and two steps with the cache."""
    made = passes.compile(load(family).captured, pipeline, CALIBRATION, backend="onnx(accuracy_level=1)")
    models = made.lowered("reference"), made
    found, past = [], [None, None]
    for ids in (tokens(2, 9), tokens(2, 1, seed=5), tokens(2, 1, seed=6)):
        outputs = [model(input_ids=ids, past_key_values=cache) for model, cache in zip(models, past, strict=True)]
        past = [output.past_key_values for output in outputs]
        oracle, ours = (output.logits for output in outputs)
        found.append(((ours - oracle).abs() / oracle.abs().amax()).flatten())
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.thorough)])
def test_rotations_are_exact(family):
    text = "rotate(where=['R1', 'R2', 'R3', 'R4']), balance_channels(online=True), observe, smooth_channels(where=['norm'])"
    assert errors(family, text).amax() < 1e-5


@pytest.mark.parametrize(
    "pipeline",
    [
        "mixed(bits=3.6, groups=(16, 32), steps=3)",
        pytest.param("mixed(bits=2.6, rounding='gptq')", marks=pytest.mark.thorough),
    ],
)
def test_mixed_widths_are_exact(pipeline):
    assert errors("llama", pipeline).amax() < 1e-5


@pytest.mark.parametrize(
    "pipeline",
    [
        "w4a4",
        "w8a8(transform='smoothrot', cache=8)",
        "mixed(bits=5.6, widths=('W4A4', 'W8A8'), groups=(-1, 32), steps=3, own_text=False)",
        pytest.param("canonicalize, quantize_cache(bits=12.0, widths=(2, 4, 8, 16))", marks=pytest.mark.thorough),
    ],
)
def test_quantized_transforms_follow_the_oracle(pipeline):
    # A difference of 1e-7 can move a value to the next code, in 4 bits a fifteenth of the range: then rows from here on differ by more.
    found = errors("llama", pipeline)
    assert found.quantile(0.5) < 1e-4
    assert found.mean() < 0.01
