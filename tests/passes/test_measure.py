import math

import pytest
import torch

from passes.measure import agreement, divergence, greedy, perplexity
from tests.families import load
from tests.passes.samples import compiled, tokens


@pytest.fixture(scope="module")
def model():
    return load("llama").model


@pytest.fixture(scope="module")
def same():
    return compiled("llama", "canonicalize")


def test_perplexity_is_that_of_the_mean_cross_entropy(model, same):
    ids = tokens(5, 12)
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)
    assert perplexity(same, ids, batch=2) == pytest.approx(expected, rel=1e-4)


def test_a_model_does_not_diverge_from_itself(model, same):
    ids = tokens(3, 10)
    assert divergence(same, model, ids) == pytest.approx(0, abs=1e-6)
    assert agreement(same, model, ids) == 1


def test_divergence_is_that_of_kullback_and_leibler(model):
    ids, other = tokens(3, 10), compiled("llama", "w2a16")
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1).flatten(0, 1) for m in (model, other))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert divergence(other, model, ids, batch=2) == pytest.approx(float(expected), rel=1e-4)
    assert agreement(other, model, ids) == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))


@pytest.mark.parametrize("padding", [0, 4])
def test_greedy_text_is_that_of_transformers(model, same, padding):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    expected = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    assert torch.equal(torch.stack(list(greedy(same, ids, 16, mask)), 1), expected[:, 9:])


def test_greedy_text_ends_where_every_row_has_ended(same):
    ids = tokens(1, 9)
    whole = [int(token) for token in greedy(same, ids, 12)]
    cut = [int(token) for token in greedy(same, ids, 12, end=whole[4])]
    assert cut == whole[: whole.index(whole[4]) + 1]
