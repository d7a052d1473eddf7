import pytest
import torch

import passes
from ir.cache import cache_sites
from ir.cache_code import CacheCode
from ir.encoding import Encoding
from ir.errors import OptionError
from passes.budget.cache_widths import check_budget, choose, elements, predicted, token_bits
from passes.learning.divergence import divergence
from tests.families import LAYERS, load
from tests.passes.samples import context, run, tokens

BATCHES = [{"input_ids": tokens(8, 24, seed)} for seed in range(6)]
TEXTS = ["u2[1,-1]dynamic", "u4[1,-1]dynamic", "u8[1,-1]dynamic"]
CODES = [*(CacheCode(Encoding.parse(text)) for text in TEXTS), None]

ALONE = {"key": "keys={}, values=16", "value": "keys=16, values={}"}


def prepared(family="llama", dtype=torch.float32):
    gm = load(family, dtype).graph()
    run(gm, "canonicalize")
    return gm, context(gm, BATCHES), {site: CODES for _, site in cache_sites(gm)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["key", "value"])
def test_predictions_are_near_what_is_measured(family, part):
    gm, ctx, options = prepared(family)
    own = {site: codes for site, codes in options.items() if site.part == part}
    found = predicted(gm, ctx, own, tokens=4096, seed=0)
    for index, bits in enumerate((2, 4)):
        made = passes.compile(load(family).captured, f"canonicalize, quantize_cache({ALONE[part].format(bits)})")
        models = (made, load(family).model)
        changed, exact = (torch.cat([model(input_ids=batch["input_ids"]).logits.detach() for batch in BATCHES]) for model in models)
        assert sum(costs[index] for costs in found.values()) == pytest.approx(float(divergence(changed, exact)), rel=0.5)


def test_wider_codes_cost_less_and_floats_nothing():
    gm, ctx, options = prepared()
    for costs in predicted(gm, ctx, options, tokens=128, seed=0).values():
        assert costs == sorted(costs, reverse=True)
        assert costs[-1] == 0 < costs[-2]
    assert predicted(gm, ctx, options, tokens=128, seed=0) == predicted(gm, ctx, options, tokens=128, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_signature(dtype):
    gm, _, options = prepared(dtype=dtype)
    assert sum(token_bits(site, None) for site in options) == 8 * gm.meta["signature"].token_bytes
    for bits, code in zip((2, 4, 8), CODES, strict=False):
        copy = load("llama", dtype).graph()
        run(copy, f"canonicalize, quantize_cache(bits={bits})")
        assert sum(token_bits(site, code) for site in options) == 8 * copy.meta["signature"].token_bytes
    assert elements(list(options)) == 2 * LAYERS * 2 * 16


@pytest.mark.parametrize("bits", [4.0, 5.0, 8.5, 15.125])
def test_a_budget_is_met_from_below(bits):
    gm, ctx, options = prepared()
    made = choose(gm, ctx, options, bits, tokens=256, seed=0)
    used = sum(token_bits(site, code) for site, code in made.items()) / elements(list(options))
    assert 0.99 * bits <= used <= bits
    assert sum(row["bytes a token"] for row in ctx.tables["cache"]) == used * elements(list(options)) / 8
    assert any(f"{used:.3f} bits an element of the cache" in note for note in ctx.notes)
    assert list(made.values()) == list(choose(gm, ctx, options, bits, tokens=256, seed=0).values())


def test_more_budget_costs_less():
    gm, ctx, options = prepared()
    costs = []
    for bits in (3.5, 5.0, 8.0, 20.0, 32.0):
        choose(gm, ctx, options, bits, tokens=256, seed=0)
        costs.append(sum(row["predicted, nats a token"] for row in ctx.tables["cache"]))
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 5
    assert costs[-1] == 0


def test_a_budget_that_is_too_small_names_the_least_that_works():
    _, _, options = prepared()
    with pytest.raises(OptionError, match="no choice of widths") as error:
        check_budget(options, 3.0)
    assert "bits=3.5," in error.value.remedy
    check_budget(options, 3.5)
