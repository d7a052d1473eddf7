import pytest

from ir.cache import cache_sites
from ir.dot_products import queries
from tests.families import load
from tests.passes.samples import run


@pytest.mark.parametrize(("family", "operand"), [("llama", "query"), ("gpt2", "query"), ("gemma2", "self"), ("mistral", "query")])
def test_cached_keys_meet_the_queries_of_their_layer(family, operand):
    gm = load(family).graph()
    run(gm, "canonicalize")
    keys = [site for name, site in cache_sites(gm) if name.endswith(".key")]
    found = [queries(site) for site in keys]
    assert [([name for _, name in met], reason) for met, reason in found] == [([operand], "")] * 2
    assert len({met[0][0] for met, _ in found}) == 2


def test_values_meet_no_query():
    gm = load("llama").graph()
    run(gm, "canonicalize")
    met, reason = queries(next(site for name, site in cache_sites(gm) if name.endswith(".value")))
    assert not met
    assert reason
