"""Cases from cases: bytes, JSON, headers of safetensors and ONNX tensors changed a little, in ways that have hurt parsers before."""

import contextlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import onnx

Case = dict[str, bytes]

NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308, float("inf"), float("nan"), 0.5)
TEXTS = (
    *("", "..", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "a" * 5000, "{}", "__class__"),
    *("self", "class", "<script>", "é", "1"),
)
PLACES = ("../secret", "/etc/passwd", "-1", str(2**63), "")
SHAPES = ([], [0], [-1], [2**40], [2**62, 4], [1] * 70, [[1]], {}, {"node": "x"}, {"tuple": []}, {"torch": "load"})
BYTES = (
    *(b"\x00", b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"[" * 3000, b'{"a":' * 1500, b"-", b"9" * 5000),
    *(b"*a", b"&a ", b"!!", b'"', b","),
)


def mutated(case: Case, draw: random.Random) -> Case:
    """A case with one to four changes."""
    changed = dict(case)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        name = draw.choice(sorted(changed))
        changed[name] = _change(name, draw)(changed[name], draw)
    if len(changed) > 1 and draw.random() < 0.03:
        changed.pop(draw.choice(sorted(changed)))
    return changed


def _change(name: str, draw: random.Random) -> Callable[[bytes, random.Random], bytes]:
    """How to change a file: mostly as its kind says, else byte by byte."""
    aware = {"json": json_change, "safetensors": header_change, "onnx": onnx_change}.get(name.rpartition(".")[2])
    return aware if aware is not None and draw.random() < 0.75 else byte_change


def byte_change(content: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, moved or put in."""
    at, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0 and content:
        place = min(at, len(content) - 1)
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[end:]
    if kind == 3:
        return content[:end] + content[at : min(end, at + 1000)] * draw.choice((1, 2, 20)) + content[end:]
    if kind == 4:
        return content[:at] + draw.choice(BYTES) + content[at:]
    return content[:at] + draw.randbytes(draw.choice((1, 4, 8))) + content[end:]


def json_change(content: bytes, draw: random.Random) -> bytes:
    """A value replaced, removed, doubled or nested."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return byte_change(content, draw)
    places = list(_places(data))
    if not places:
        return json.dumps(_value(draw)).encode()
    holder, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 1:
        del holder[key]
    elif kind == 2:
        other, its = draw.choice(places)
        with contextlib.suppress(LookupError):  # it may have gone with what held it
            holder[key] = json.loads(json.dumps(other[its]))
    elif kind == 3 and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = holder.pop(key)
    else:
        holder[key] = _value(draw)
    return json.dumps(data).encode()


def _places(data: Any) -> Any:
    """Every place within JSON, as what holds it and the key."""
    left = [data]
    while left:
        holder = left.pop()
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ():
            yield holder, key
            left.append(value)


def _value(draw: random.Random) -> Any:
    return draw.choice((draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice(SHAPES), None, True))


def header_change(content: bytes, draw: random.Random) -> bytes:
    """The header of a file of safetensors changed as JSON, with its own length or a wrong one."""
    (size,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    header = json_change(content[8 : 8 + min(size, 1 << 20)], draw)
    length = draw.choice((len(header), len(header), len(header), 0, 2**63, size))
    return struct.pack("<Q", length) + header + content[8 + size :]


def onnx_change(content: bytes, draw: random.Random) -> bytes:
    """A tensor, its place or the metadata of an ONNX model changed."""
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception:  # protobuf's errors are of no common kind
        return byte_change(content, draw)
    kind = draw.randrange(4)
    if kind == 0 and model.metadata_props:
        entry = draw.choice(list(model.metadata_props))
        with contextlib.suppress(UnicodeError):
            value = entry.value if isinstance(entry.value, bytes) else entry.value.encode()  # text that is no UTF-8 comes as bytes
            entry.value = json_change(value, draw).decode("utf-8", "replace")
    elif kind == 1 and model.graph.initializer:
        tensor = draw.choice(list(model.graph.initializer))
        tensor.dims[:] = [draw.choice((-1, 0, 1, 2**40, 2**62)) for _ in range(draw.randrange(4))]
    elif kind == 2 and model.graph.initializer:
        tensor = draw.choice(list(model.graph.initializer))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = (
            draw.choice(("location", "offset", "length")),
            draw.choice(PLACES),
        )
    elif model.graph.node:
        node = draw.choice(list(model.graph.node))
        node.op_type = draw.choice(("Expand", "Loop", "EPContext", "Tile", "Nothing", "Relu"))
    return model.SerializeToString()
