import pytest
import torch

from ir.encoding import Encoding
from ir.rounding import METHODS, Evidence
from ir.weights import unrounded
from passes.data.spread import codes_of, pieces
from passes.ranks import Ranks
from tests.families import load
from tests.passes.samples import run


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("shapes", [[(704, 256)], [(512, 96), (128, 96), (130, 96)], [(96, 640)] * 3])
def test_every_row_has_one_owner_and_work_is_even(world, shapes):
    cut = pieces(world, [(shape, True) for shape in shapes])
    for place, (N, _) in enumerate(shapes):
        assert [row for piece in cut if piece.place == place for row in range(N)[piece.rows]] == list(range(N))
    load = [sum((p.rows.stop - p.rows.start) * shapes[p.place][1] for p in cut if p.owner == rank) for rank in range(world)]
    assert max(load) <= sum(load) / world + 2 * 64 * shapes[0][1]
    assert len({piece.owner for piece in cut}) == min(world, sum(-(-N // 128) for N, _ in shapes)) or max(load) < sum(load)


def test_weights_that_stay_whole_go_to_who_has_least():
    cut = pieces(2, [((64, 64), False), ((256, 64), False), ((128, 64), False)])
    assert [(piece.place, piece.rows.stop, piece.owner) for piece in cut] == [(0, 64, 1), (1, 256, 0), (2, 128, 1)]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.by_rows])
@pytest.mark.parametrize("world", [2, 3])
def test_rows_rounded_apart_are_the_rows_of_the_whole(name, world):
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(300, 96, generator=generator), torch.randn(320, 96, generator=generator)
    gram, encoding = X.T @ X / 300, Encoding.parse("i2[1,32]" if name == "ternary" else "u4[1,32]" if name == "gptq" else "i3[1,-1]")
    evidence = Evidence(gram=gram, cross=gram + 0.01 * torch.randn(96, 96, generator=generator))
    codes, qparams = METHODS[name]().round_weight(W, encoding, evidence)
    cut = pieces(world, [((320, 96), True)])
    parts = [METHODS[name]().round_weight(W[piece.rows], encoding, evidence) for piece in cut]
    assert len(parts) > 1
    assert torch.equal(torch.cat([part for part, _ in parts]), codes)
    assert torch.equal(torch.cat([part.scale for _, part in parts]), qparams.scale)


def test_one_process_rounds_whole_weights():
    gm = load("llama").graph()
    run(gm, "canonicalize, untie, annotate(scheme='W4A16')")
    layer, method = unrounded(gm)[0], METHODS["nearest"]()
    W = torch.randn(130, 64, generator=torch.Generator().manual_seed(0))
    ((codes, qparams),) = codes_of(Ranks(), method, [(layer, Evidence(), W)])
    exact, expected = method.round_weight(W, layer.mark.weight)
    assert torch.equal(codes, exact) and torch.equal(qparams.scale, expected.scale)
