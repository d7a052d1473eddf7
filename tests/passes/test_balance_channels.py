import pytest
import torch

from ir.errors import DataError, OptionError
from ir.match import find
from ir.ops import HADAMARD
from passes.balance_channels import BalanceChannels
from tests.families import load
from tests.passes.maps import DECODERS, OPENED, kept
from tests.passes.samples import run


@pytest.mark.parametrize("family", DECODERS)
def test_balancing_keeps_the_function(family):
    gm, records, _, error = kept(family, f"{OPENED}, balance_channels(online=True)")
    assert records[-1].sites == 2 + 2
    assert len(find(gm, HADAMARD)) == 2
    assert error < 1e-4


def test_heads_are_balanced_offline():
    gm, records, _, error = kept("llama", f"{OPENED}, balance_channels")
    assert records[-1].sites == 2
    assert not find(gm, HADAMARD, torch.ops.aten.bmm.default)
    assert error < 1e-5


def test_it_lowers_the_error_of_rounding():
    found = {}
    for text in ("", ", balance_channels(online=True)"):
        gm, _, ctx, _ = kept("llama", f"{OPENED}, annotate(scheme='W4A4', targets=['down_proj', 'o_proj']){text}")
        records, _ = run(gm, "quantize", ctx=ctx)
        found[bool(text)] = records[-1].difference
    assert found[True] < found[False]


def test_blocks_that_do_not_divide_are_noted():
    _, records, ctx, _ = kept("llama", f"{OPENED}, balance_channels(online=True, block=36)")
    assert records[-1].sites == 2
    assert any("blocks of 36 do not divide 96 channels" in note for note in ctx.notes)


def test_it_needs_data_and_blocks():
    with pytest.raises(DataError, match="calibration"):
        run(load("llama").graph(), f"{OPENED}, balance_channels")
    with pytest.raises(OptionError):
        BalanceChannels(block=1)
