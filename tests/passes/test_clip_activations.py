import pytest
import torch

from ir.capture import capture
from ir.errors import DataError, OptionError
from ir.sites import layers
from passes.clip_activations import ClipActivations
from tests.passes.samples import Mlp, run, vectors


def clips(scheme, x):
    gm = capture(Mlp(), (vectors(),))
    run(gm, f"canonicalize, annotate(scheme='{scheme}'), clip_activations", [x])
    return [layer.site("input").encoding.clip for layer in layers(gm)]


def test_gaussian_inputs_are_clipped_the_more_the_fewer_bits():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    four, eight = clips("W4A4", x)[0], clips("W8A8", x)[0]
    assert 0.7 <= four < 1
    assert eight > 0.9


def test_even_inputs_are_not_clipped():
    x = torch.randint(0, 2, (512, 64), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    assert clips("W4A4", x)[0] == 1


def test_clipping_lowers_the_error():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    found = {}
    for text in ("", "clip_activations, "):
        gm = capture(Mlp(), (x,))
        records, _ = run(gm, f"canonicalize, annotate(scheme='W4A4'), {text}quantize", [x])
        found[bool(text)] = records[-1].difference
    assert found[True] < found[False]


def test_static_activations_are_left():
    gm = capture(Mlp(), (vectors(),))
    records, _ = run(gm, "canonicalize, annotate(dynamic=False), clip_activations", [vectors()])
    assert records[-1].sites == 0


def test_it_needs_data_and_tokens():
    with pytest.raises(DataError, match="calibration"):
        run(capture(Mlp(), (vectors(),)), "canonicalize, annotate, clip_activations")
    with pytest.raises(OptionError):
        ClipActivations(tokens=0)
