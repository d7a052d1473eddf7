import pytest

from ir.errors import DataError
from ir.signature import Port, Signature
from ir.stated import signature_of

CACHE = [Port(f"{side}.0.{part}", "float32", (None, 2, None, 8)) for side in ("past_key_values", "present") for part in ("key", "value")]
SIGNATURE = Signature(
    (Port("input_ids", "int64", (None, None)), *CACHE[:2]),
    (Port("logits", "float32", (None, None, 32)), *CACHE[2:]),
    "CausalLMOutputWithPast",
    ("input_ids",),
)


def test_a_signature_survives():
    assert signature_of(SIGNATURE.to_json()) == SIGNATURE


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("inputs"),
        lambda data: data.update(inputs=[]),
        lambda data: data.update(inputs=3),
        lambda data: data["inputs"][0].update(dtype="load"),
        lambda data: data["inputs"][0].update(shape=[-1]),
        lambda data: data["inputs"][0].update(shape=["x"]),
        lambda data: data["inputs"][0].update(shape=[True]),
        lambda data: data["inputs"].append(data["inputs"][0]),
        lambda data: data["inputs"][1].update(shape=[None, 2, 2**40, 8]),  # a call would make that cache up
        lambda data: data["inputs"][1].update(shape=[None]),
        lambda data: data["inputs"][1].update(name="past_key_values.0"),
        lambda data: data["outputs"][0].update(name="nothing"),
        lambda data: data.update(positional=["pixels"]),
        lambda data: data.update(positional=3),
    ],
)
def test_what_is_no_signature_is_refused(damage):
    data = SIGNATURE.to_json()
    data = {**data, "inputs": [dict(port) for port in data["inputs"]], "outputs": [dict(port) for port in data["outputs"]]}
    damage(data)
    with pytest.raises(DataError):
        signature_of(data)
