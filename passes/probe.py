"""What the checks of effects compare: the model's own outputs on the probe, over two steps with the cache carried on."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from ir import evaluate
from ir.errors import DataError
from ir.signature import TOKENS, Port, Signature


def model_outputs(gm: GraphModule, probe: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The model's own outputs on the probe; a model with a cache starts with an empty one, and takes a token more with what it then holds.

    What a cache holds is private: a rotation of values may change it, and not what the model says.
    """
    if not probe:
        return ()
    signature: Signature | None = gm.meta.get("signature")
    if signature is None or not signature.layers:
        return evaluate.run(gm, probe)
    first = _without_past(signature, probe)
    outputs = evaluate.run(gm, first)
    second = _next(signature, first, outputs)
    return _own(signature, outputs) + (_own(signature, evaluate.run(gm, second)) if second else ())


def _own(signature: Signature, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(value for value, port in zip(outputs, signature.outputs, strict=True) if not port.cached)


def _without_past(signature: Signature, probe: Sequence[Tensor]) -> list[Tensor]:
    """The probe with an empty cache; a mask loses what it says of past tokens."""
    past = next(value.shape[TOKENS] for value, port in zip(probe, signature.inputs, strict=True) if port.cached)

    def fresh(port: Port, value: Tensor) -> Tensor:
        if port.cached:
            return value.narrow(TOKENS, 0, 0)
        return value[..., past:] if port.name == "attention_mask" else value

    return [fresh(port, value) for value, port in zip(probe, signature.inputs, strict=True)]


def _next(signature: Signature, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor] | None:
    """The inputs of a second step: the last token again, behind the first step's cache; None if they cannot be made up."""
    given = dict(zip((port.name for port in signature.inputs), inputs, strict=True))
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    try:
        return signature.bind(input_ids=given["input_ids"][:, -1:], attention_mask=mask, past_key_values=signature.cache_of(outputs))
    except (DataError, KeyError):
        return None


def relative_error(outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> float:
    """The greatest `‖y − y₀‖ / ‖y₀‖` over floating-point outputs, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, reference, strict=True) if a.is_floating_point()]
    return max((float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach()) for a, b in pairs), default=0.0)
