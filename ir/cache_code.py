"""`CacheCode`: how keys and values become what a quantized cache keeps, and floats again; for graphs and tensors alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit
from ir.cache import CacheSite
from ir.encoding import Encoding, Float
from ir.match import aten
from ir.ops import CHOOSE_QPARAMS, DEQUANTIZE, PACK, QUANTIZE, UNPACK
from ir.packing import per_byte
from ir.signature import CACHE, PRESENT, TOKENS, Port, Signature

CODES, SCALE, ZERO_POINT = "", "_scale", "_zero_point"  # what is kept, by the suffix of its port: past_key_values.0.key_scale
SCALE_DTYPE = torch.float16  # of scales that are kept for every token

Call = Callable[..., Any]  # call(target, *operands): emits a node, or computes a tensor


@dataclass(frozen=True)
class CacheCode:
    """How one tensor of a cache is kept.

    Args:
        encoding: of `[batch, heads, tokens, width]`.
        scale: of a static encoding: a tensor, or the node of one.
        zero_point: of a static asymmetric encoding, likewise.
        packed: several codes to a byte, if the width allows it. Floats are kept as bytes in any case.
    """

    encoding: Encoding
    scale: Any = None
    zero_point: Any = None
    packed: bool = True

    def encode(self, x: Any, call: Call) -> dict[str, Any]:
        """What is kept of new tokens `x`: codes, and for dynamic encodings scales and zero points, by suffix."""
        text, scale, zero_point = str(self.encoding), self.scale, self.zero_point
        if self.encoding.dynamic:
            chosen = call(CHOOSE_QPARAMS, x, text, SCALE_DTYPE)
            scale = call(getitem, chosen, 0)
            zero_point = None if self.encoding.symmetric else call(getitem, chosen, 1)
        codes = call(QUANTIZE, x, scale, zero_point, text)
        kept = {CODES: call(PACK, codes, text) if self._bytes else codes}
        if self.encoding.dynamic:
            kept |= {SCALE: scale} if zero_point is None else {SCALE: scale, ZERO_POINT: zero_point}
        return kept

    def decode(self, kept: Mapping[str, Any], dtype: torch.dtype, call: Call) -> Any:
        """The keys or values that `kept` stands for."""
        text = str(self.encoding)
        codes = call(UNPACK, kept[CODES], text) if self._bytes else kept[CODES]
        return call(DEQUANTIZE, codes, kept.get(SCALE, self.scale), kept.get(ZERO_POINT, self.zero_point), text, dtype)

    def token_bytes(self, site: CacheSite) -> int:
        """Bytes that a site keeps for each token: codes, and for dynamic encodings scales, and zero points of one byte."""
        codes = site.width // per_byte(self.encoding) if self._bytes else site.width
        scales = self.encoding.scale_shape((1, site.width))[-1] if self.encoding.dynamic else 0
        return site.heads * (codes + scales * (SCALE_DTYPE.itemsize + (not self.encoding.symmetric)))

    @property
    def _bytes(self) -> bool:
        # As floats, codes would pass for a cache that is not quantized.
        return isinstance(self.encoding.format, Float) or (self.packed and per_byte(self.encoding) > 1)


def compute(target: Any, *operands: Any) -> Any:
    """A `Call` on tensors."""
    return target(*operands)


def recode(gm: GraphModule, plan: Sequence[tuple[CacheSite, CacheCode]]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Let a graph keep its cache as codes, in place, its signature and example with it.

    Before: `%k_all = cat([%past, %k], -2)`, which attention reads and the graph returns
    After:  `%codes = cat([%past, encode(%k)], -2)`, which the graph returns; `decode(%codes)`, which attention reads

    Returns:
        What turns flat inputs for the graph as it was into flat inputs for the graph as it is.
    """
    signature: Signature = gm.meta["signature"]
    codes = {f"{CACHE}.{site.name}": code for site, code in plan}
    results = list(zip(signature.outputs, gm.graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
    taken: dict[str, list[Port]] = {}
    kept: dict[str, list[tuple[Port, Node]]] = {}
    for site, code in plan:
        past, present = _recode_site(gm, site, code)
        taken[f"{CACHE}.{site.name}"] = [Port.of(f"{CACHE}.{site.name}{suffix}", edit.value(node)) for suffix, node in past.items()]
        kept[f"{PRESENT}.{site.name}"] = [
            (Port.of(f"{PRESENT}.{site.name}{suffix}", edit.value(node)), node) for suffix, node in present.items()
        ]
    returned = [pair for port, node in results for pair in kept.get(port.name, [(port, node)])]
    edit.set_outputs(gm, [node for _, node in returned])
    inputs = tuple(port for old in signature.inputs for port in taken.get(old.name, [old]))
    gm.meta["signature"] = replace(signature, inputs=inputs, outputs=tuple(port for port, _ in returned))

    def convert(flat: Sequence[Tensor]) -> list[Tensor]:
        values: list[Tensor] = []
        for port, x in zip(signature.inputs, flat, strict=True):
            values += codes[port.name].encode(x, compute).values() if port.name in codes else [x]
        return values

    gm.meta["example"] = convert(gm.meta["example"])
    return convert


def _recode_site(gm: GraphModule, site: CacheSite, code: CacheCode) -> tuple[dict[str, Node], dict[str, Node]]:
    """Recode one site; the inputs and the results that take its place, by suffix."""

    def call(target: Any, *operands: Any) -> Node:
        return edit.emit(gm, target, operands, before=site.joined)

    stored = {suffix: getattr(code, name) for suffix, name in ((SCALE, "scale"), (ZERO_POINT, "zero_point"))}
    nodes = {
        suffix: None if tensor is None else edit.add_attribute(gm, f"cache.{site.name}{suffix}", tensor, before=site.joined)
        for suffix, tensor in stored.items()
    }
    code = replace(code, scale=nodes[SCALE], zero_point=nodes[ZERO_POINT])
    dtype = edit.value(site.joined).dtype
    new = code.encode(site.new, call)
    past: dict[str, Node] = {}
    last = site.past
    for suffix, node in new.items():
        fake, former = edit.value(node), edit.value(site.past)
        shape = [former.shape[0], fake.shape[1], former.shape[TOKENS], fake.shape[3]]
        if suffix == CODES:
            edit.set_input(site.past, shape, fake.dtype)
        else:
            last = edit.add_input(gm, f"{site.past.name}{suffix}", shape, fake.dtype, after=last)
        past[suffix] = last
    joined = {suffix: call(aten.cat.default, [past[suffix], node], -2) for suffix, node in new.items()}
    present = dict(joined)
    for cut in site.slices:
        present = {suffix: edit.emit(gm, cut.target, (node, *cut.args[1:]), cut.kwargs, before=cut) for suffix, node in present.items()}
    edit.replace(site.joined, code.decode(joined, dtype, call))
    return past, present
