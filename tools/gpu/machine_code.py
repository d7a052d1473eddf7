"""What Triton and ptxas make of a kernel, without a GPU: registers, spills, shared memory and the instructions of its loops."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNMENT = 16  # bytes of pointers, and what sizes divide by: what the launcher finds out about arguments

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_MATRIX = re.compile(r"^(HGMMA|IGMMA)\.(\d+)x(\d+)x(\d+)|^(HMMA|IMMA)\.(\d+)")
_TILES = {"1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32), "8816": (8, 8, 16)}  # m, n, k of a warp's instruction


@dataclass(frozen=True)
class Instruction:
    """An operation with its modifiers, `HGMMA.64x8x16.F32`, and the text of its operands."""

    operation: str
    operands: str

    @property
    def products(self) -> int:
        """Multiply-accumulates that a warp does with it; the four warps of a warp group share those of one instruction."""
        found = _MATRIX.match(self.operation)
        if found is None:
            return 0
        if found[1]:
            return int(found[2]) * int(found[3]) * int(found[4]) // 4
        m, n, k = _TILES[found[6]]
        return m * n * k


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel."""

    lines: tuple[Instruction | str, ...]  # a label is its name
    registers: int
    shared: int

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        return tuple(line for line in self.lines if isinstance(line, Instruction) and line.operation != "NOP")

    def count(self, start: str) -> int:
        """Instructions whose operation starts so."""
        return sum(each.operation.startswith(start) for each in self.instructions)

    @property
    def spills(self) -> int:
        return self.count("STL") + self.count("LDL")

    @property
    def matrix(self) -> str:
        """The matrix instruction that does most products, without its modifiers; empty if there is none."""
        found = Counter[str]()
        for each in self.instructions:
            found[each.operation.partition(".")[0]] += each.products
        operation, products = found.most_common(1)[0]
        return operation if products else ""

    @property
    def loop(self) -> tuple[Instruction, ...]:
        """The innermost loop that does most products; the longest where none does any."""
        found = [body for body in self._loops() if not any(other != body and _within(other, body) for other in self._loops())]
        bodies = [tuple(line for line in self.lines[a:b] if isinstance(line, Instruction)) for a, b in found]
        return max(bodies, key=lambda body: (sum(each.products for each in body), len(body)), default=())

    def _loops(self) -> list[tuple[int, int]]:
        places = {line: index for index, line in enumerate(self.lines) if isinstance(line, str)}
        loops = []
        for index, line in enumerate(self.lines):
            if isinstance(line, Instruction) and line.operation.startswith("BRA"):
                target = re.search(r"\.L_\w+", line.operands)
                start = places.get(target[0], index) if target else index
                if start < index - 1:  # the branch to itself that ends every kernel is none
                    loops.append((start, index + 1))
        return loops


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    warps: int,
    stages: int,
    odd: frozenset[str] = frozenset(),
    fusion: bool = True,
) -> MachineCode:
    """The machine code of `kernel` for `sm_{arch}`, with arguments of the types of `signature`, all aligned but those of `odd`."""
    if not hasattr(kernel, "arg_names") or os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("kernels are compiled in a process without TRITON_INTERPRET")
    names = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, (name, kind) in enumerate(names.items())
        if name not in odd and (kind.startswith("*") or kind in {"i32", "i64"})
    }
    made = triton.compile(
        ASTSource(kernel, names, dict(constants), aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+)", _run("cuobjdump", "-res-usage", file.name))
        text = _run("nvdisasm", "-c", file.name)
    return MachineCode(tuple(parsed(text)), int(usage[1]) if usage else 0, made.metadata.shared)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def parsed(text: str) -> list[Instruction | str]:
    """Instructions and labels of what `nvdisasm -c` prints."""
    lines: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            lines.append(label[1])
        elif found := _INSTRUCTION.match(line):
            lines.append(Instruction(found[1], found[2].strip()))
    return lines
