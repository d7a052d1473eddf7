import pytest
import torch

from ir.errors import DataError
from ir.signature import Port, Signature

IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.fixture(scope="module")
def signature(families):
    return families("llama").graph().meta["signature"]


def test_json_round_trip(signature):
    assert Signature.from_json(signature.to_json()) == signature


def test_names_state_the_structure(signature):
    assert [port.name for port in signature.inputs][-2:] == ["past_key_values.1.key", "past_key_values.1.value"]
    assert [port.name for port in signature.outputs] == ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
    assert signature.layers == 2


def test_missing_inputs_are_made_up(signature):
    bound = dict(zip([port.name for port in signature.inputs], signature.bind(input_ids=IDS), strict=True))
    assert bound["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert bound["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert bound["past_key_values.0.key"].shape == (2, 2, 0, 16)


def test_positions_count_the_unmasked_tokens(signature):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    bound = signature.bind(input_ids=IDS, attention_mask=mask)
    assert bound[2].tolist() == [[0, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS}, "unknown inputs"),
        ({}, "'input_ids' is missing"),
        ({"input_ids": IDS[0]}, "missing|shape"),
        ({"input_ids": IDS.float()}, "dtype"),
        ({"input_ids": IDS, "past_key_values": [(torch.zeros(2, 3, 1, 16),) * 2] * 2}, "shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(signature, inputs, message):
    with pytest.raises(DataError, match=message):
        signature.bind(**inputs)


def test_too_many_positional_arguments_are_refused(signature):
    with pytest.raises(DataError, match="positional"):
        signature.bind(*[IDS] * 9)


def test_integers_of_another_width_are_converted(signature):
    assert signature.bind(input_ids=IDS.to(torch.int32))[0].dtype == torch.int64


def coded(heads=2):
    """The ports of one layer whose keys are kept as codes."""
    parts = {"key": ("uint8", 8), "key_scale": ("float16", 1), "value": ("float32", 16)}
    ports = [tuple(Port(f"{name}.0.{part}", dtype, (None, heads, None, width)) for part, (dtype, width) in parts.items())
             for name in ("past_key_values", "present")]  # fmt: skip
    tokens, logits = Port("input_ids", "int64", (None, None)), Port("logits", "float32", (None, None, 128))
    return Signature((tokens, *ports[0]), (logits, *ports[1]), "CausalLMOutputWithPast", ("input_ids",))


def test_a_quantized_cache_is_a_list_of_dicts_that_can_be_fed_back():
    signature = coded()
    assert (signature.layers, signature.token_bytes) == (1, 2 * (8 + 2 + 64))
    assert [port.name for port in signature.coded] == ["present.0.key", "present.0.key_scale"]
    empty = signature.bind(IDS)
    assert [(part.dtype, part.shape) for part in empty[1:]] == [
        (port.torch_dtype, (2, 2, 0, port.shape[3])) for port in signature.inputs[1:]
    ]
    kept = [torch.ones(2, 2, 3, port.shape[3]).to(port.torch_dtype) for port in signature.outputs[1:]]
    past = signature.wrap([torch.zeros(2, 3, 128), *kept]).past_key_values
    assert [list(layer) for layer in past] == [["key", "key_scale", "value"]]
    assert all(given is part for given, part in zip(signature.bind(IDS, past_key_values=past)[1:], kept, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.pop("key_scale"), "lacks 'past_key_values.0.key_scale'"),
        (lambda layer: layer.update(key_zero_point=layer["key"]), "does not know, 'past_key_values.0.key_zero_point'"),
        (lambda layer: layer.update(key=layer["value"]), "dtype|shape"),
    ],
)
def test_a_quantized_cache_that_does_not_fit_is_refused(change, message):
    signature = coded()
    (layer,) = signature.wrap([torch.zeros(2, 3, 128), *signature.bind(IDS)[1:]]).past_key_values
    change(layer)
    with pytest.raises(DataError, match=message):
        signature.bind(IDS, past_key_values=[layer])


def test_one_plain_output_is_a_tensor_and_several_are_a_tuple():
    port = Port("y", "float32", (None,))
    value = torch.ones(1)
    assert Signature((), (port,)).wrap([value]) is value
    assert Signature((), (port, port)).wrap([value, value]) == (value, value)


def test_a_dtype_that_is_none_is_refused():
    with pytest.raises(DataError, match="not a dtype"):
        _ = Port("x", "nn", (1,)).torch_dtype
