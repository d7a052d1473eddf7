from collections import Counter

import pytest
import torch

import passes
from backends.triton_gpu.fuse import fuse
from backends.triton_gpu.layout import CONTAINERS
from ir import edit
from ir.errors import BackendError
from ir.match import find, operands
from ir.ops import QUANTIZE
from ir.verify import verify
from tests.backends.onnx_qdq.conftest import branches, flat_inputs, relative

PACKED_LINEAR, PACKED_LINEAR_INT8 = torch.ops.fxpress.packed_linear.default, torch.ops.fxpress.packed_linear_int8.default
PAIRS = {
    "a": ("i4[1,32]", None),
    "b": ("u3[1,-1]", None),
    "c": ("i1[1,64]", "i8[1,-1]dynamic"),
    "d": ("i8[1,-1]", "u8[1,-1]dynamic"),
    "e": ("u4[1,32]", "i4[1,-1]dynamic"),
    "f": ("i4[1,-1]", "u8[-1]"),
    "g": ("i8[1,-1]", "u4[-1]"),
    "h": ("i6[16,32]", "i8[-1]"),
    "i": ("i4[1,-1]", "i8[1,32]dynamic"),
    "j": ("i4[1,-1]", "f8e4m3[1,-1]dynamic"),
}
EMULATED = {"i", "j"}


@pytest.fixture(scope="module")
def pair():
    """Linears over one input in many encodings, and the fused graph."""
    gm = branches(PAIRS)
    notes: list[str] = []
    return gm, *fuse(gm, notes), notes


def test_every_pair_of_encodings_gives_what_the_graph_gives(pair):
    gm, fused, *_ = pair
    verify(fused)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 96)
        for ours, oracle in zip(fused(x), gm(x), strict=True):
            assert relative(ours, oracle) < 1e-6


def test_codes_are_those_of_the_graph(pair):
    gm, fused, *_ = pair
    reference, ours = edit.copied(gm), edit.copied(fused)
    products = find(ours, PACKED_LINEAR_INT8)
    taken = [node for node in find(reference, QUANTIZE) if str(operands(node)["encoding"]) not in {PAIRS[name][1] for name in EMULATED}]
    assert len(products) == len(taken) == 6
    edit.set_outputs(reference, taken)
    edit.set_outputs(ours, [node.args[0] for node in products])
    for graph in (reference, ours):
        edit.clean(graph)
    x = torch.randn(4, 3, 96)
    for node, expected, codes in zip(taken, reference(x), ours(x), strict=True):
        encoding = str(operands(node)["encoding"])
        shift = 0 if encoding.startswith("i") else 128 if "dynamic" in encoding else 2 ** (int(encoding[1]) - 1)
        assert codes.dtype == torch.int8 and torch.equal(codes.to(torch.int16), expected.to(torch.int16) - shift)


def test_sites_say_what_runs_them(pair):
    _, fused, sites, notes = pair
    assert Counter(site.operator for site in sites) == {"fxpress.packed_linear": 4, "fxpress.packed_linear_int8": 6}
    assert [site.path for site in sites] == [f"linears.{name}" for name in PAIRS]
    assert all(site.bytes_before == 4 * 64 * 96 and 0 < site.bytes_now < 64 * 96 * 2 for site in sites)
    assert [note.split()[0] for note in notes] == ["i8[1,32]dynamic", "f8e4m3[1,-1]dynamic"]
    for target, container in ((PACKED_LINEAR, 16), (PACKED_LINEAR_INT8, 8)):
        planes = [plane for node in find(fused, target) for plane in operands(node)["planes"]]
        assert {edit.value(plane).dtype for plane in planes} == {CONTAINERS[container]}


def test_the_graph_that_is_fused_stays_as_it_was(pair):
    gm, *_ = pair
    before, names = str(gm.graph), sorted(name for name, _ in gm.named_buffers())
    fuse(gm, [])
    assert (str(gm.graph), sorted(name for name, _ in gm.named_buffers())) == (before, names)


TIED = "canonicalize, annotate(scheme='{}', head=True, embeddings=True, targets=('lm_head',)), round_weights(method='nearest'), quantize"


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
def test_a_tied_head_and_its_embedding_read_one_table(families, scheme):
    gm = passes.compile(families("llama_tied").graph(), TIED.format(scheme)).graph
    fused, sites = fuse(gm, [])
    (gather,) = find(fused, torch.ops.fxpress.packed_embedding.default)
    (reader,) = find(fused, PACKED_LINEAR if scheme == "W4A16" else PACKED_LINEAR_INT8)
    assert operands(gather)["planes"] == operands(reader)["planes"]
    assert [bool(site.bytes_now) for site in sites] == [True, False]
    inputs = flat_inputs(gm, 2, 5)
    assert relative(fused(*inputs)[0], gm(*inputs)[0]) < 1e-5


def test_what_has_no_place_is_refused_with_its_path():
    with pytest.raises(BackendError, match=r"groups of 16(.|\n)*linears\.odd"):
        fuse(branches({"odd": ("i4[1,16]", None)}), [])
    with pytest.raises(BackendError, match="float64"):
        gm = branches({"wide": ("i4[1,32]", None)})
        for node in find(gm, torch.ops.aten.linear.default):
            node.meta["val"] = edit.value(node).double()
        fuse(gm, [])
