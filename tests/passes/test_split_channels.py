import pytest
import torch

import passes
from ir.errors import DataError, OptionError
from passes.split_channels import SplitChannels
from tests.families import load
from tests.passes.samples import CALIBRATION, Mlp, run, vectors, wide_share

MARKED = "canonicalize, untie, annotate(scheme='W4A4')"


def with_outliers(channels):
    """A module whose input has a few channels far greater than the rest, and text for it."""
    model, x = Mlp().eval(), vectors(rows=128)
    x[:, channels] *= 50
    model.requires_grad_(False)
    return model, x


@pytest.mark.parametrize("by", ["activation", "loss"])
def test_outliers_are_chosen_and_stop_stretching_the_others_scales(by):
    model, x = with_outliers([5, 40])
    exact = model(x)
    errors = []
    for step in ("", f"split_channels(high='W8A8', share=0.02, multiple=1, by='{by}'),"):
        made = passes.compile(model, f"{MARKED}, {step} quantize", [(x,)], args=(x,))
        errors.append(float((made(x) - exact).norm() / exact.norm()))
    assert errors[1] < 0.7 * errors[0]
    channels = next(tensor for name, tensor in made.graph.state_dict().items() if name.endswith("channels_0"))
    assert sorted(channels.tolist())[:2] == [5, 40]


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_share_is_met_from_below(share):
    gm = load("llama").graph()
    _, ctx = run(gm, f"{MARKED}, split_channels(high='W8A8', share={share}, multiple=4)", CALIBRATION)
    assert share - 0.02 < wide_share(gm) <= share
    assert any(f"{wide_share(gm):.2%}" in note for note in ctx.notes)


def test_without_a_scheme_assign_bits_chooses_for_the_parts():
    model, x = with_outliers(range(16))
    pipeline = (
        "canonicalize, untie, annotate(scheme='W4A16', group=16, symmetric=False), split_channels(share=0.125), "
        "assign_bits(bits=4.0, widths=(2, 8)), round_weights"
    )
    made = passes.compile(model, pipeline, [(x,)], args=(x,))
    rows = {row["layer"]: row["encoding"][:2] for row in made.report().tables["widths"]}
    assert rows["up"] == "u8"  # the outliers, which come first
    assert set(rows.values()) == {"u2", "u8"}
    assert made.effective_bits <= 4.0


def test_bfloat16_and_the_onnx_backend():
    pipeline = "canonicalize, untie, annotate(scheme='W4A16'), split_channels(high='W8A16', share=0.25), round_weights"
    made = passes.compile(load("llama", torch.bfloat16).captured, pipeline, CALIBRATION, backend="onnx")
    ids = CALIBRATION[0]["input_ids"]
    found, exact = made(input_ids=ids).logits, passes.compile(made.graph, "canonicalize")(input_ids=ids).logits
    assert float((found.float() - exact.float()).norm() / exact.float().norm()) < 0.02


def test_it_refuses_what_it_cannot_do():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{MARKED}, split_channels")
    with pytest.raises(OptionError, match="before quantize"):
        run(load("llama").graph(), f"{MARKED}, quantize(weights=False), split_channels(high='W8A8')", CALIBRATION)
    for options in ({"high": "W9A9"}, {"share": 0.0}, {"by": "luck"}, {"multiple": 0}):
        with pytest.raises(OptionError):
            SplitChannels(**options)
