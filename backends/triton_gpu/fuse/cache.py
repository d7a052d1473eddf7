"""What `quantize_cache` writes in several operators becomes one, and what it reads too."""

from operator import getitem
from typing import Any

from torch.fx import GraphModule, Node

from backends.triton_gpu.ops.cache import DEQUANTIZE_CACHE, QUANTIZE_CACHE
from ir import edit
from ir.encoding import Encoding
from ir.match import aten, find, is_call, operands
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, PACK, QUANTIZE, UNPACK

LEFT = "keys or values in {} are rounded by torch, in several launches: kernels take dynamic scales, and at 8 bits unsigned codes only"


def fuse_cache(gm: GraphModule, notes: list[str]) -> int:
    """Fuse the operators of a quantized cache; the number of places.

    Before: `%c = choose_qparams(%k, encoding, float16); %q = quantize(%k, %s, %z, encoding); %p = pack(%q, encoding)`
    After:  `%p, %s, %z = quantize_cache(%k, encoding, float16)`

    Before: `%q = unpack(%all, encoding); %k_all = dequantize(%q, %scales, %zeros, encoding, dtype)`
    After:  `%k_all = dequantize_cache(%all, %scales, %zeros, encoding, dtype)`

    Unsigned codes of 8 bits are packed as they are, so `pack` and `unpack` are missing there. Static scales stay as they are.
    """
    places = [_write(gm, node) or _read(gm, node) for node in find(gm, QUANTIZE, DEQUANTIZE)]
    edit.drop_unread(gm)
    kept = (node for node in find(gm, QUANTIZE) if all(is_call(user, PACK, aten.cat.default) for user in node.users))
    left = {str(operands(node)["encoding"]) for node in kept}
    notes.extend(LEFT.format(encoding) for encoding in sorted(left))
    return sum(places)


def _write(gm: GraphModule, node: Node) -> bool:
    """Fuse one quantize with the choice of its scales and the packing of its codes."""
    given = operands(node)
    scale: Any = given["scale"]
    if node.target is not QUANTIZE or not is_call(scale, getitem) or not is_call(scale.args[0], CHOOSE_QPARAMS):
        return False
    choose, result = scale.args[0], _packed(node, given["encoding"])
    if result is None:
        return False
    kept = edit.emit(gm, QUANTIZE_CACHE, tuple(operands(choose).values()), before=choose)
    for reader in list(choose.users):
        part: Any = reader.args[1]  # scale or zero point
        edit.replace(reader, edit.emit(gm, getitem, (kept, part + 1), before=choose))
    edit.replace(result, edit.emit(gm, getitem, (kept, 0), before=result))
    return True


def _packed(node: Node, encoding: str) -> Node | None:
    """The packed form of new codes, which the cache takes: what packs them, or themselves where they fill unsigned bytes."""
    (reader,) = list(node.users)[:1]
    if is_call(reader, PACK):
        return reader if len(node.users) == 1 else None
    return node if _whole(encoding) and is_call(reader, aten.cat.default) else None


def _whole(encoding: str) -> bool:
    """Whether codes are unsigned bytes, packed or not."""
    stated = Encoding.parse(encoding)
    return stated.bits == 8 and not stated.symmetric


def _read(gm: GraphModule, node: Node) -> bool:
    """Fuse one dequantize with the unpacking of its codes."""
    given = operands(node)
    if node.target is not DEQUANTIZE or not Encoding.parse(given["encoding"]).dynamic:
        return False
    source: Any = given["codes"]
    if is_call(source, UNPACK):
        source = source.args[0]
    elif not _whole(given["encoding"]) or not is_call(source, aten.cat.default):
        return False
    edit.replace(node, edit.emit(gm, DEQUANTIZE_CACHE, (source, given["scale"], given["zero_point"], *node.args[3:]), before=node))
    return True
