import pytest
import torch
import transformers
from torch import nn

from ir.capture import capture
from ir.errors import CaptureError, DataError
from tests.families import FAMILIES, VOCABULARY, build


def relative(a, b):
    return float((a - b).norm() / b.norm())


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gpt2", 1), *((name, 2) for name in FAMILIES)])
@torch.no_grad()
def test_the_graph_equals_the_model_from_an_empty_cache_and_on(families, name, batch):
    family = families(name)
    gm = family.graph()
    signature = gm.meta["signature"]
    past = expected_past = None
    for length in (1, 12, 3, 1) if name != "bert" else (1, 12):
        ids = tokens(batch, length)
        cache = {} if past is None else {"past_key_values": past}
        expected_cache = {} if expected_past is None else {"past_key_values": expected_past}
        outputs = signature.wrap(gm(*signature.bind(input_ids=ids, **cache)))
        expected = family.model(input_ids=ids, **expected_cache)
        assert type(outputs) is type(expected)
        assert relative(outputs.logits, expected.logits) < 1e-5
        past, expected_past = outputs.get("past_key_values"), expected.get("past_key_values")


@torch.no_grad()
def test_padding_on_the_left_is_masked(families):
    family = families("llama")
    gm = family.graph()
    signature = gm.meta["signature"]
    ids = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = signature.wrap(gm(*signature.bind(input_ids=ids, attention_mask=mask))).logits[0, 2:]
    alone = signature.wrap(gm(*signature.bind(input_ids=ids[:1, 2:]))).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "bert"])
def test_the_callers_model_is_left_as_it_was(name):
    model = build(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(value) for key, value in model.named_parameters()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    config = model.config.to_dict()
    capture(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert identities == {key: id(value) for key, value in model.named_parameters()}
    assert attributes == {path: set(vars(module)) for path, module in model.named_modules()}
    assert config == model.config.to_dict()
    assert all(module.training for module in model.modules())


def test_the_graph_shares_the_models_parameters(families):
    family = families("llama")
    kept = {p.data_ptr() for p in family.model.parameters()}
    assert {p.data_ptr() for p in family.graph().parameters()} <= kept


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, y=None):
        return self.linear(x), (x if y is None else y) * 2


def test_a_plain_module_is_captured_with_args():
    model = Two()
    gm = capture(model, args=(torch.randn(2, 8),))
    x = torch.randn(5, 8)
    signature = gm.meta["signature"]
    outputs = signature.wrap(gm(*signature.bind(x)))
    torch.testing.assert_close(outputs, model(x))


def test_a_plain_module_is_captured_with_args_and_kwargs():
    model = Two()
    gm = capture(model, args=(torch.randn(2, 8),), kwargs={"y": torch.randn(2, 3)})
    x, y = torch.randn(5, 8), torch.randn(5, 3)
    signature = gm.meta["signature"]
    torch.testing.assert_close(signature.wrap(gm(*signature.bind(x, y=y))), model(x, y))
    torch.testing.assert_close(signature.wrap(gm(*signature.bind(x=x, y=y))), model(x, y))


def test_a_captured_graph_is_copied(families):
    gm = families("gpt2").graph()
    twin = capture(gm)
    assert twin is not gm
    assert twin.meta["signature"] == gm.meta["signature"]
    example = gm.meta["example"]
    assert torch.equal(twin(*example)[0], gm(*example)[0])


def test_hugging_face_inputs_may_be_given():
    model = build("llama")
    gm = capture(model, kwargs={"input_ids": tokens(2, 5), "use_cache": False})
    signature = gm.meta["signature"]
    assert signature.names == ("input_ids",)
    ids = tokens(3, 9)
    torch.testing.assert_close(signature.wrap(gm(*signature.bind(input_ids=ids))).logits, model(ids).logits)


def test_a_plain_module_needs_inputs():
    with pytest.raises(DataError, match="needs example inputs"):
        capture(nn.Linear(2, 2))


def test_an_encoder_decoder_is_refused_with_a_remedy():
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        capture(transformers.T5ForConditionalGeneration(config))


def test_what_cannot_be_traced_is_refused_with_the_cause():
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match="cannot trace Branches") as caught:
        capture(Branches(), args=(torch.randn(2, 2),))
    assert caught.value.__cause__ is not None
