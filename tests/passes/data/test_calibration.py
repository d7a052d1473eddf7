from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ir.capture import capture
from ir.errors import DataError
from passes.data.calibration import flat_batches, token_windows, without_past
from tests.families import load
from tests.passes.samples import Mlp, tokens, vectors

IDS = tokens(4, 6)


def ids_of(calibration):
    return [batch[0] for batch in flat_batches(load("llama").captured, calibration)]


@pytest.mark.parametrize(
    ("calibration", "sizes"),
    [
        ([{"input_ids": IDS}, {"input_ids": IDS[:1]}], [4, 1]),
        ([IDS, IDS[:2]], [4, 2]),
        (list(IDS), [1, 1, 1, 1]),
        (IDS, [1, 1, 1, 1]),
        ([(IDS,), [IDS]], [4, 4]),
        (({"input_ids": row[None]} for row in IDS), [1, 1, 1, 1]),
        (DataLoader(IDS, batch_size=2), [2, 2]),
        (DataLoader(TensorDataset(IDS), batch_size=3), [3, 1]),
        ([{"input_ids": IDS.to(torch.int32)}], [4]),
        ([{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], [4]),
    ],
    ids=["dicts", "tensors", "rows", "tensor", "tuples", "generator", "loader", "dataset", "int32", "mask"],
)
def test_what_a_caller_has_becomes_flat_batches(calibration, sizes):
    found = ids_of(calibration)
    assert [len(batch) for batch in found] == sizes
    assert all(batch.dtype == torch.int64 for batch in found)


def test_missing_inputs_are_made_up():
    captured = load("llama").captured
    (batch,) = flat_batches(captured, [IDS])
    assert len(batch) == len(captured.meta["signature"].inputs)


def test_no_calibration_is_no_batches():
    assert flat_batches(load("llama").captured, None) == []


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration is empty"),
        (iter(()), "calibration is empty"),
        ([{"ids": IDS}], "unknown inputs"),
        ([{"attention_mask": IDS}], "'input_ids' is missing"),
        ([IDS.float()], "dtype"),
        ([IDS[None]], "shape"),
        ([IDS[:, :0]], "empty"),
        ([IDS[:0]], "empty"),
        (["some text"], "not str"),
        ({"input_ids": IDS}, "not str"),
        ([3], "not int"),
        ([[1, 2, 3]], "not list"),
        ([{"input_ids": [[1, 2]]}], "input_ids"),
        ([{"input_ids": 3}], "input_ids"),
        ([{"input_ids": "text"}], "input_ids"),
        ([(IDS,) * 20], "positional"),
    ],
)
def test_data_that_do_not_fit_are_refused(calibration, message):
    with pytest.raises(DataError, match=message):
        ids_of(calibration)


def test_the_error_names_the_batch():
    with pytest.raises(DataError, match="calibration batch 1"):
        ids_of([IDS, {"ids": IDS}])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_have_to_be_finite(bad):
    gm = capture(Mlp(), args=(vectors(),))
    assert len(flat_batches(gm, [vectors(), {"x": vectors()}, (vectors(),)])) == 3
    with pytest.raises(DataError, match="not finite"):
        flat_batches(gm, [torch.full((4, 64), bad)])


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_cut_from_the_text():
    text = "abcdefghij"
    assert token_windows(text, Letters(), 4).tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert token_windows(text, Letters(), 2, count=2).tolist() == [[97, 98], [99, 100]]
    drawn = token_windows(text, Letters(), 2, seed=3)
    assert drawn.tolist() == token_windows(text, Letters(), 2, seed=3).tolist()
    assert sorted(drawn.tolist()) == token_windows(text, Letters(), 2).tolist()


def test_a_short_text_is_refused():
    with pytest.raises(DataError, match="3 tokens, fewer than one window of 4"):
        token_windows("abc", Letters(), 4)


def test_empty_caches_take_the_heads_of_another_graph():
    signature = load("llama").signature
    ports = [replace(port, shape=(None, 1, None, 16)) if port.cached else port for port in signature.inputs]
    fewer = replace(signature, inputs=tuple(ports))
    (batch,) = flat_batches(load("llama").captured, [IDS])
    made = without_past(fewer, batch)
    assert [value.shape[1] for value, port in zip(made, ports, strict=True) if port.cached] == [1] * 4
    assert all(a is b for a, b, port in zip(made, batch, ports, strict=True) if not port.cached)
    assert all(a is b for a, b in zip(without_past(signature, batch), batch, strict=True))
    with pytest.raises(DataError, match="calibrate without a cache"):
        without_past(fewer, load("llama").captured.meta["example"])
