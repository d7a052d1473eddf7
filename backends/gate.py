"""The gate of a lowering: its outputs are those of the graph, the oracle, up to what one rounding can move."""

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from ir.encoding import Encoding
from ir.match import find, operand
from ir.ops import QUANTIZE
from ir.signature import Signature

TOLERANCES = (
    # least bits of an activation, greatest ‖ours − oracle‖ / ‖oracle‖: a rounding that falls on the other side moves outputs by a step
    (16, 1e-3),
    (8, 5e-2),
    (0, 0.5),
)
TOLERANCE_OF_HALF_ORACLES = 5e-2  # the oracle itself rounds to 8 or 11 bits


def activations(gm: GraphModule) -> list[Encoding]:
    """The encodings in which the graph rounds activations and what its cache keeps."""
    return [Encoding.parse(str(operand(node, "encoding"))) for node in find(gm, QUANTIZE)]


def tolerance(rounded: Sequence[Encoding], oracle: Sequence[Tensor]) -> float:
    """The difference up to which outputs count as equal, for the encodings of what is rounded at run time and the oracle's outputs."""
    allowed = next(bound for bits, bound in TOLERANCES if min((encoding.bits for encoding in rounded), default=32) >= bits)
    half = any(y.is_floating_point() and y.dtype.itemsize < 4 for y in oracle)
    return max(allowed, TOLERANCE_OF_HALF_ORACLES) if half else allowed


def difference(ours: Sequence[Tensor], oracle: Sequence[Tensor]) -> float:
    """The greatest ‖ours − oracle‖ / ‖oracle‖ over the outputs; infinite if a value is not finite where the oracle's is."""
    return max((_distance(a, b) for a, b in zip(ours, oracle, strict=True) if b.numel()), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    finite = b.isfinite()
    if a.shape != b.shape or not a[finite].isfinite().all():
        return float("inf")
    norm = float(b[finite].norm())
    return float((a[finite] - b[finite]).norm()) / (norm or 1.0)


def uncoded(signature: Signature, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs that can be compared as numbers: not codes of a cache, which a difference of 1e-7 can move by one."""
    return [y for y, port in zip(outputs, signature.outputs, strict=True) if port not in signature.coded]
