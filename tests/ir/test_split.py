import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ir import evaluate
from ir.sites import layers
from ir.split import best_channels, split, split_off, splittable
from tests.families import load
from tests.passes.samples import run


def marked(family="llama", scheme="W4A4"):
    gm = load(family).graph()
    run(gm, f"canonicalize, untie, annotate(scheme='{scheme}')")
    return gm


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parts_add_up(family):
    gm = marked(family)
    exact = evaluate.run(gm, gm.meta["example"])
    for source, found in splittable(gm).items():
        order = torch.randperm(found[0].weight.meta["val"].shape[1])
        split(gm, source, found, [order[:5], order[5:5], order[5:]])
    gm.recompile()
    for a, b in zip(evaluate.run(gm, gm.meta["example"]), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not splittable(gm)


def test_the_chosen_part_has_its_scheme_and_the_greatest_channels_first():
    gm = marked()
    source, found = next(iter(splittable(gm).items()))
    size = torch.arange(64.0)
    split_off(gm, source, found, torch.tensor([3, 60, 7]), "W8A8", size)
    first, second = (layer for layer in layers(gm) if layer.path.startswith(found[0].path))
    assert [str(first.site(name).encoding) for name in ("input", "weight")] == ["i8[1,-1]dynamic", "i8[1,-1]"]
    assert [str(second.site(name).encoding) for name in ("input", "weight")] == ["i4[1,-1]dynamic", "i4[1,-1]"]
    channels = [gm.get_buffer(str(layer.site("input").operand.args[2].target)).tolist() for layer in (first, second)]
    assert channels[0] == [60, 7, 3]
    assert channels[1] == sorted(set(range(64)) - {3, 7, 60}, reverse=True)


@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from([1, 2, 4]))
def test_the_best_channels_fit_and_nothing_better_is_left(seed, share, multiple):
    generator = torch.Generator().manual_seed(seed)
    scores, rows = [torch.rand(size, generator=generator) for size in (8, 12)], [3, 3]
    picked = best_channels(scores, rows, share, multiple)
    room = share * 60
    taken = 3 * sum(map(len, picked))
    assert taken <= room + 1e-3
    assert taken + 3 * multiple > room - 1e-3 or all(len(own) + multiple > len(score) for own, score in zip(picked, scores, strict=True))
    if multiple == 1:
        chosen = torch.cat([score[own] for score, own in zip(scores, picked, strict=True)])
        left = torch.cat(
            [score[[i for i in range(len(score)) if i not in own.tolist()]] for score, own in zip(scores, picked, strict=True)]
        )
        assert not len(chosen) or not len(left) or chosen.min() >= left.max()


def test_room_counts():
    picked = best_channels([torch.tensor([4.0, 1.0]), torch.tensor([5.0, 5.0])], [1, 10], 2 / 22, 1)
    assert [own.tolist() for own in picked] == [[0, 1], []]  # a channel of the second takes ten times as much
