from itertools import pairwise

import pytest
import torch

from backends.reference import Reference, ReferenceExecutable
from ir import evaluate
from ir.encoding import Encoding
from ir.errors import DataError
from tests.families import load
from tests.passes.samples import compiled, tokens

PIPELINES = ["canonicalize", "w8a16", "w4a16", "w8a8", "w8a8(dynamic=False)"]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_it_runs_the_graph_before_and_after_loading(tmp_path, pipeline):
    gm = compiled("llama", pipeline).graph
    inputs = gm.meta["signature"].bind(input_ids=tokens(3, 7))
    executable = Reference().lower(gm, inputs, [])
    expected = evaluate.run(gm, inputs)
    executable.save(tmp_path)
    for runner in (executable, Reference().load(tmp_path)):
        found = runner(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not any(output.requires_grad for output in found)


def test_files_shrink_with_the_bits(tmp_path):
    sizes = []
    for pipeline in ("untie", "w8a16(head=True)", "w4a16(head=True)", "w3a16(head=True)", "w2a16(head=True)"):
        folder = tmp_path / str(len(sizes))
        folder.mkdir()
        ReferenceExecutable(compiled("llama", pipeline).graph).save(folder)
        sizes.append((folder / "weights.safetensors").stat().st_size)
        assert sizes[-1] >= compiled("llama", pipeline).report().coverage.stored
    assert sizes == sorted(sizes, reverse=True)
    assert all(b < 0.9 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize("encoding", ["i8[1,-1]", "i1[1,64]", "f8e4m3[-1]", "u8[-1]dynamic"])
def test_it_supports_every_encoding(encoding):
    assert Reference().supports("Linear", {"weight": Encoding.parse(encoding)}, (8, 64)) is None


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError):
        Reference().load(tmp_path)


def test_it_has_nothing_to_add_to_the_report():
    assert Reference().lower(load("llama").captured, [], []).report() == {}
