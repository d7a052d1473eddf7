import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from ir.cache import CacheSite, cache_sites
from ir.cache_code import CacheCode, recode
from ir.canonical import canonicalize
from ir.capture import capture
from ir.encoding import Encoding
from tests.families import FAMILIES, LAYERS

HEADS, WIDTH = 2, 8


class Appending(nn.Module):
    """One layer's keys, appended to the past in some way, and their sum over tokens."""

    def __init__(self, append, attend=None):
        super().__init__()
        self.keys = nn.Linear(16, HEADS * WIDTH, bias=False)
        self.append, self.attend = append, attend or (lambda past, kept: kept)

    def forward(self, x, past):
        new = self.keys(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        joined, kept = self.append(past, new)
        return self.attend(past, joined).sum(2), kept


def joined(past, new):
    both = torch.cat([past, new], -2)
    return both, both


def windowed(past, new):
    both = torch.cat([past, new], -2)
    return both, both[:, :, -4:]


def inputs(tokens=3, past=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens, 16, generator=generator), torch.randn(2, HEADS, past, WIDTH, generator=generator)


def graph(append=joined, attend=None, result="present.0.key"):
    """The graph of a layer, with the names of a cache."""
    torch.manual_seed(0)
    gm = capture(Appending(append, attend), args=inputs())
    canonicalize(gm)
    signature = gm.meta["signature"]
    (x, past), (y, kept) = signature.inputs, signature.outputs
    names = (x, replace(past, name="past_key_values.0.key")), (y, replace(kept, name=result))
    gm.meta["signature"] = replace(signature, inputs=names[0], outputs=names[1])
    return gm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("canonical", [False, True])
def test_every_decoder_appends_keys_and_values_of_every_layer(families, family, canonical):
    gm = families(family).graph()
    if canonical:
        canonicalize(gm)
    found = dict(cache_sites(gm))
    expected = [] if family == "bert" else [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    assert list(found) == expected
    for name, site in found.items():
        assert isinstance(site, CacheSite), site
        assert (site.name, site.part, site.width, site.slices) == (name, name[2:], 16, ())
        assert site.past.op == "placeholder"


@pytest.mark.parametrize(
    ("gm", "reason"),
    [
        (lambda: graph(lambda past, new: joined(new, past)), "is %.* not the past with new tokens appended"),
        (lambda: graph(lambda past, new: (torch.cat([past, new], -2), new + 0.0 * new)), "not the past with new tokens appended"),
        (lambda: graph(attend=lambda past, kept: kept + past.mean(2, keepdim=True)), "past tokens are also read by .*mean"),
        (lambda: graph(result="present.1.key"), r"takes past_key_values\.0\.key and returns no present\.0\.key"),
    ],
)
def test_a_cache_that_is_not_appended_to_says_why(gm, reason):
    ((name, found),) = cache_sites(gm())
    assert name == "0.key"
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_heads_of_a_width_that_varies_say_so():
    class Copied(nn.Module):
        def forward(self, x, past):
            both = torch.cat([past, x], -2)
            return both.sum(2), both

    gm = capture(Copied(), args=(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)))
    signature = gm.meta["signature"]
    ports = (replace(signature.inputs[1], name="past_key_values.0.key"), replace(signature.outputs[1], name="present.0.key"))
    gm.meta["signature"] = replace(signature, inputs=(signature.inputs[0], ports[0]), outputs=(signature.outputs[0], ports[1]))
    assert "fixed heads and width" in dict(cache_sites(gm))["0.key"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_window_that_slides_drops_codes_as_it_drops_tokens(tokens):
    gm, coded = graph(windowed), graph(windowed)
    ((_, site),) = cache_sites(coded)
    assert len(site.slices) == 1
    convert = recode(coded, [(site, CacheCode(Encoding.parse("u8[1,-1]dynamic")))])
    coded.recompile()
    x, past = inputs(tokens)
    sums, kept = gm(x, past)
    found, codes, scale, zero_point = coded(*convert([x, past]))
    assert [part.shape[2] for part in (kept, codes, scale, zero_point)] == [4] * 4
    torch.testing.assert_close(found, sums, atol=0.05, rtol=0)
    torch.testing.assert_close((codes.float() - zero_point.float()) * scale.float(), kept, atol=0.02, rtol=0)
