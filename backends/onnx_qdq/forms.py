"""The table of verified forms: which pair of encodings becomes which ONNX nodes, and what ONNX Runtime must make of them.

A quantized operator is fast only if ONNX Runtime fuses it, and when it does not it says nothing. Each form therefore names the operator
that has to run, once per site, in place of the nodes that we write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ir.encoding import Encoding, Int

LEAST_BLOCK, GREATEST_BLOCK = 16, 256  # of MatMulNBits and GatherBlockQuantized, in powers of two
ROW_BLOCK = 128  # a whole row is stored as blocks of this size with one scale repeated
SERIES_2 = (32, 128)  # blocks for which 2-bit weights have a fast kernel


@dataclass(frozen=True)
class Form:
    """A way to write a site that was verified against the reference.

    Args:
        name: what reports call it.
        fused: the operator that ONNX Runtime runs for it.
        widths: the widths in bits in which weights can be stored, ascending; codes go to the least that holds them.
        note: a sentence for the user if the form computes otherwise than the encodings suggest; empty if not.
    """

    name: str
    fused: str
    widths: tuple[int, ...]
    note: str = ""


BLOCKED = Form("blocked weight", "MatMulNBits", (2, 4, 8))
INTEGER = Form("integer matmul", "MatMulIntegerToFloat", (8,))
EMULATED = Form(
    "blocked weight, activation rounded in float",
    "MatMulNBits",
    (2, 4, 8),
    note="activations are rounded as asked but multiplied as floats: ONNX Runtime has no integer kernel for this pair of encodings",
)
GATHERED = Form("blocked rows, gathered", "GatherBlockQuantized", (2, 4, 8))
SHARED = Form("blocked weight, shared with an embedding", "MatMulNBits", (4, 8))

FORMS: Mapping[tuple[str, str, str], Form] = {
    # operator, scales of the weight, activation
    ("linear", "groups", "float"): BLOCKED,
    ("linear", "rows", "float"): BLOCKED,
    ("linear", "rows", "token"): INTEGER,
    ("linear", "rows", "tensor"): INTEGER,
    ("linear", "rows", "other"): EMULATED,
    ("linear", "groups", "token"): EMULATED,
    ("linear", "groups", "tensor"): EMULATED,
    ("linear", "groups", "other"): EMULATED,
    ("embedding", "groups", "float"): GATHERED,
    ("embedding", "rows", "float"): GATHERED,
}


def weight_scales(weight: Encoding) -> str:
    """`rows` if a scale spans whole rows of a weight [N, K], else `groups`."""
    return "rows" if weight.block[-1] == -1 else "groups"


def activation_kind(activation: Encoding | None) -> str:
    """How an activation is rounded: not (`float`), symmetric per `token` at run time, static per `tensor`, or some `other` way."""
    if activation is None:
        return "float"
    if activation.dynamic:
        return "token" if activation.symmetric and activation.block == (1, -1) else "other"
    return "tensor"


def form_of(operator: str, weight: Encoding, activation: Encoding | None) -> Form:
    """The form of a site for which `refusal` is None."""
    return FORMS[operator, weight_scales(weight), activation_kind(activation)]


def refusal(operator: str, encodings: Mapping[str, Encoding], shape: Sequence[int]) -> str | None:
    """Why a site cannot be lowered, as a sentence; None if it can.

    Args:
        operator: `Linear`, `Embedding`, or `Cache` for a cache of keys or values.
        encodings: by operand: `weight`, `input`; of a cache `key` or `value`.
        shape: of the weight, [N, K]; of a cache, heads and their width.
    """
    name = operator.lower()
    if name == "cache":
        return cache_refusal(encodings)
    if name not in {key[0] for key in FORMS}:
        return f"ONNX Runtime has no quantized form of {name}; quantize linear and embedding only"
    weight, activation = encodings.get("weight"), encodings.get("input")
    if name == "embedding" and activation is not None:
        return "an embedding's input is indices, which are not quantized"
    reasons = (
        _weight_refusal(name, weight, shape) if weight is not None else None,
        _activation_refusal(activation) if activation is not None else None,
    )
    return next((reason for reason in reasons if reason), None)


def cache_refusal(encodings: Mapping[str, Encoding]) -> str | None:
    """Why keys or values cannot be kept in these encodings; None if they can."""
    wrong = [encoding for encoding in encodings.values() if not isinstance(encoding.format, Int) or encoding.bits == 1]
    return f"keys and values are kept in integers of 2 to 8 bits, not as {wrong[0]}" if wrong else None


def _weight_refusal(name: str, weight: Encoding, shape: Sequence[int]) -> str | None:
    if not isinstance(weight.format, Int):
        return f"ONNX Runtime's CPU kernels have no {weight} weights; use integers of 1 to 8 bits"
    if weight.dynamic:
        return "weights are constants, their scales cannot be dynamic"
    if block_size(weight, shape[-1], ragged=name != "embedding") is None:
        reason = f"{weight} over rows of {shape[-1]} fits no block of {LEAST_BLOCK} codes or more"
        return f"{reason}; use groups of 32, 64 or 128 that divide the row"
    return None


def _activation_refusal(activation: Encoding) -> str | None:
    if not isinstance(activation.format, Int) or activation.bits == 1:
        return f"ONNX Runtime's CPU kernels have no {activation} activations; use i8[1,-1]dynamic or u8[-1]"
    if activation.block not in ((-1,), (1, -1)):
        return f"activations have one scale per tensor [-1] or per token [1,-1], not {activation}"
    if not activation.dynamic and activation.block != (-1,):
        return f"the number of tokens varies, so {activation} cannot have static scales; add dynamic"
    return None


def block_size(weight: Encoding, size: int, *, ragged: bool = True) -> int | None:
    """The block in which a row of `size` codes is stored: a power of two that divides the encoding's block; None if there is none.

    Args:
        weight: the weight's encoding; scales that span more than a block are repeated.
        size: number of codes in a row, K.
        ragged: whether the last block may be partial.
    """
    group = weight.block[-1]
    whole = group == -1 or group >= size
    if whole and ragged:
        return min(ROW_BLOCK, max(LEAST_BLOCK, 1 << (size - 1).bit_length()))
    divided = size if whole else group
    block = min(divided & -divided, GREATEST_BLOCK)
    return block if block >= LEAST_BLOCK and (ragged or size % block == 0) else None


def stored_width(form: Form, weight: Encoding, rows: int, block: int) -> int:
    """Bits per stored code.

    Two bits need `rows` divisible by 4 (ONNX Runtime 1.31 packs other weights wrongly, without a word) and a block that has a kernel.
    """
    least, greatest = SERIES_2
    for width in form.widths:
        if width < weight.bits or (width == 2 and (rows % 4 or not least <= block <= greatest)):
            continue
        return width
    raise AssertionError(f"{form} holds no {weight}")
