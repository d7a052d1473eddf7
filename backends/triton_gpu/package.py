"""`TritonExecutable`: a fused graph, its report, and the folder that both are saved as."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from backends.triton_gpu import layout
from backends.triton_gpu.decoding import StaticDecoder
from backends.triton_gpu.fuse.linears import COLUMNS, NARROW, WIDE
from backends.triton_gpu.ops.linear import PACKED_LINEAR_INT8
from ir import edit
from ir.errors import DataError, OptionError
from ir.files import appearing, inside, read_json
from ir.match import find, operands
from ir.place import device_of, on, place
from ir.serialize import load_graph, save_graph
from ir.signature import Signature
from ir.stated import signature_of

FILE = "triton.json"
EAGER = "the operators' eager bodies, in torch on the CPU: exact, and slow; move the model to an NVIDIA GPU for the kernels"
KERNELS = "kernels on {}"


class TritonExecutable:
    """A fused graph: call it with flat tensors, move it, save it, load it.

    Args:
        gm: the graph; `gm.meta["columns"]` is K of the weights in narrow containers, by the name of their first plane.
        signature: of the graph.
        facts: what was measured when it was lowered.
        grows: why decoding cannot use a cache of fixed size; "" if it can.
    """

    def __init__(self, gm: GraphModule, signature: Signature, facts: dict[str, Any], grows: str = "") -> None:
        self.gm, self.signature, self.facts, self.grows = gm, signature, facts, grows
        self._decoder: StaticDecoder | None = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs for flat inputs.

        Raises:
            DataError: inputs that are not where the model is.
        """
        here = self.device
        away = [port.name for port, x in zip(self.signature.inputs, inputs, strict=True) if x.device.type != here.type]
        if away:
            raise DataError(f"input {away[0]!r} is not on {here}, where the model is", remedy="move it, or the model: compiled.to(device)")
        with on(here):
            outputs: tuple[Tensor, ...] = self.gm(*inputs)
        return outputs

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.gm)

    def to(self, device: torch.device) -> None:
        """Move the model: weights, and what the graph makes by itself."""
        self._decoder = None
        place(self.gm, device)

    def decoder(self, batch: int, capacity: int) -> StaticDecoder | None:
        """A decoder with a cache of fixed size, the former one if it is free and large enough; None if the graph has none."""
        if self.grows:
            return None
        free = self._decoder
        if free is None or free.busy or free.batch != batch or free.capacity < capacity:
            self._decoder = free = StaticDecoder(self.gm, self.signature, batch, capacity)
        free.busy = True
        return free

    def report(self) -> dict[str, Any]:
        """Operators, sites and bytes, the difference from the oracle on the probe, and what runs here."""
        here = self.device
        return {**self.facts, "runs": EAGER if here.type == "cpu" else KERNELS.format(here)}

    def save(self, directory: Path) -> None:
        """Write `graph.json`, `weights.safetensors` and `triton.json`: all planes in containers of 16 bits, and a graph for the CPU."""
        stored = edit.copied(self.gm)
        place(stored, torch.device("cpu"))
        repack(stored, self.gm.meta[COLUMNS], WIDE)
        save_graph(stored, directory)
        about = {
            "layout": layout.VERSION,
            "signature": self.signature.to_json(),
            "columns": self.gm.meta[COLUMNS],
            "grows": self.grows,
            "facts": self.facts,
        }
        with appearing(directory / FILE) as draft:
            draft.write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "TritonExecutable":
        """The executable that `save` wrote, on the CPU.

        Raises:
            DataError: there is none, it is damaged, or its weights are in another version of the layout.
        """
        if not (directory / FILE).exists():
            raise DataError(f"not a folder of the triton backend: there is no {FILE}", where=str(directory))
        try:
            about = read_json(inside(directory, FILE))
            version, signature, columns = about["layout"], signature_of(about["signature"]), dict(about[COLUMNS])
            grows, facts = str(about["grows"]), dict(about["facts"])
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise DataError(f"not a folder of the triton backend: {error}", where=str(directory)) from error
        if version != layout.VERSION:
            raise DataError(
                f"the weights are packed in version {version} of the layout, this version of fxpress reads {layout.VERSION}",
                where=str(directory),
                remedy="compile the model again, or install the version of fxpress that wrote it",
            )
        gm = load_graph(directory)
        try:
            repack(gm, columns, NARROW)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OptionError) as error:
            raise DataError(f"damaged weights: {error}", where=str(directory)) from error
        gm.meta[COLUMNS] = columns
        return cls(gm, signature, facts, grows)


def repack(gm: GraphModule, columns: Mapping[str, int], container: int) -> None:
    """Bring the weights that meet integers into containers of another width, in place."""
    for nodes, bits in _narrow_weights(gm):
        planes = [edit.attribute(gm, node) for node in nodes]
        for node, plane in zip(nodes, layout.repack(planes, bits, columns[str(nodes[0].target)], container), strict=True):
            edit.store(gm, str(node.target), plane)


def _narrow_weights(gm: GraphModule) -> Iterator[tuple[list[Node], int]]:
    """The planes of every weight that meets integers, once, and their bits."""
    seen: set[str] = set()
    for node in find(gm, PACKED_LINEAR_INT8):
        given = operands(node)
        if str(given["planes"][0].target) not in seen:
            seen.add(str(given["planes"][0].target))
            yield given["planes"], given["bits"]
