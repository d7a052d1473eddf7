from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ir.errors import OptionError
from ir.signature import Port, Signature
from passes.compiled import Compiled
from passes.decoding import Choice, Growing, decode


class Counting:
    """A model that finds the number of tokens it has seen, modulo 5, most likely; its cache is that number."""

    def __init__(self) -> None:
        self.masks: list[int] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any) -> Any:
        seen = (past_key_values or 0) + input_ids.shape[1]
        self.masks.append(attention_mask.shape[1])
        logits = torch.nn.functional.one_hot(torch.full(input_ids.shape, seen % 5), 5).float()
        return SimpleNamespace(logits=logits, past_key_values=seen)


def test_each_token_is_read_once_with_a_mask_that_grows() -> None:
    model = Counting()
    decoder = Growing(model)
    assert [int(token[0]) for token in decode(decoder, torch.ones(1, 3, dtype=torch.int64), 4)] == [3, 4, 0, 1]
    assert model.masks == [3, 4, 5, 6] and decoder.past is None


def test_rows_that_have_ended_go_on_with_the_end_and_all_stop_together() -> None:
    made = list(decode(Growing(Counting()), torch.ones(2, 3, dtype=torch.int64), 9, end=0))
    assert [token.tolist() for token in made] == [[3, 3], [4, 4], [0, 0]]


def test_drawing_follows_the_seed_and_keeps_to_the_best() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(500, 1)
    cpu = torch.device("cpu")
    drawn = Choice(temperature=1.0, seed=1).chooser(cpu)(logits)
    assert torch.equal(drawn, Choice(temperature=1.0, seed=1).chooser(cpu)(logits))
    assert not torch.equal(drawn, Choice(temperature=1.0, seed=2).chooser(cpu)(logits))
    shares = torch.bincount(drawn, minlength=4) / 500
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.06, rtol=0)
    assert set(Choice(temperature=1.0, top_k=2).chooser(cpu)(logits).tolist()) == {2, 3}
    assert Choice().chooser(cpu)(logits).tolist() == [3] * 500


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 3}, {"temperature": 1.0, "top_k": -1}])
def test_choices_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Choice(**options)


def test_only_decoders_generate() -> None:
    port = Port("x", "float32", (None, 4))
    with pytest.raises(OptionError, match="keeps no cache"):
        Compiled(Counting(), Signature((port,), (port,)), "reference").generate(torch.ones(1, 3, dtype=torch.int64))
