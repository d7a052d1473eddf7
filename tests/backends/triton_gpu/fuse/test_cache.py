import pytest
import torch

from backends.triton_gpu.fuse import fuse
from ir import edit
from ir.canonical import canonicalize
from ir.match import find
from ir.ops import CHOOSE_QPARAMS, PACK, QUANTIZE, UNPACK
from passes.base import Context
from passes.quantize_cache import QuantizeCache

WRITE, READ = torch.ops.fxpress.quantize_cache.default, torch.ops.fxpress.dequantize_cache.default


def cached(families, step: QuantizeCache):
    gm = families("llama").graph()
    canonicalize(gm)
    ctx = Context()
    step.run(gm, ctx)
    edit.clean(gm)
    return gm


@pytest.mark.parametrize("step", [QuantizeCache(4, group=8), QuantizeCache(3, symmetric=True), QuantizeCache(8)])
def test_a_cache_is_written_and_read_by_one_operator_each(families, step):
    gm, notes = cached(families, step), []
    fused, _ = fuse(gm, notes)
    assert len(find(fused, WRITE)) == len(find(fused, READ)) == 4
    assert not find(fused, CHOOSE_QPARAMS, QUANTIZE, PACK, UNPACK) and not notes
    steps = zip(families("llama").steps(fused, lengths=(5, 1, 1)), families("llama").steps(gm, lengths=(5, 1, 1)), strict=True)
    assert all(torch.equal(ours, oracle) for ours, oracle in steps)


def test_what_has_no_kernel_stays_and_is_noted(families):
    gm, notes = cached(families, QuantizeCache(8, symmetric=True)), []
    fused, _ = fuse(gm, notes)
    assert len(find(fused, QUANTIZE)) == 4 and not find(fused, WRITE, READ)
    assert [note.split(" are ")[0] for note in notes] == ["keys or values in i8[1,-1]dynamic"]
