"""What has a place in the packed layout, and which operator runs it; what has none, and why."""

from collections.abc import Mapping, Sequence

from backends.triton_gpu.layout import LANES
from ir.encoding import Encoding, Int

OPERATORS = ("linear", "embedding", "cache")


def refusal(operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
    """Why a site cannot be lowered, as a sentence; None if it can.

    Args:
        operator: `Linear`, `Embedding`, or `Cache` for a cache of keys or values.
        encodings: by operand: `weight`, `input`; of a cache `key` or `value`.
        shape: of the weight, [N, K]; of a cache, heads and their width.
    """
    name = operator.lower()
    if name not in OPERATORS:
        return f"there are no kernels of quantized {name}; quantize linear and embedding only"
    if name == "cache":
        wrong = [encoding for encoding in encodings.values() if encoding.bits == 1]
        return f"keys and values are kept in 2 to 8 bits, not as {wrong[0]}" if wrong else None
    weight = encodings.get("weight")
    if name == "embedding" and "input" in encodings:
        return "an embedding's input is indices, which are not quantized"
    return None if weight is None else _weight_refusal(weight, shape)


def _weight_refusal(weight: Encoding, shape: Sequence[int]) -> str | None:
    if not isinstance(weight.format, Int):
        return f"packed weights are integers, not {weight}; use 1 to 8 bits, or leave the layer in floating point"
    if weight.dynamic:
        return "weights are constants, their scales cannot be dynamic"
    if len(shape) != 2:
        return f"packed weights have two axes, not {len(shape)}"
    group = weight.block_shape(tuple(shape))[1]
    if group % LANES and group != shape[1]:
        return f"{LANES} consecutive weights share a scale, which groups of {group} do not; use groups of 32, 64 or 128, or -1"
    return None


def integer(activation: Encoding | None) -> bool:
    """Whether an activation's codes go into integer products: 2 to 8 bits, one scale for each token or for the tensor.

    Activations in other encodings are rounded as they say, and multiplied as floats.
    """
    if activation is None or not isinstance(activation.format, Int) or activation.bits == 1:
        return False
    return activation.block == ((1, -1) if activation.dynamic else (-1,))
