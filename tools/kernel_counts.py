"""Compiles kernels ahead of time, without a GPU, and counts what they are made of: registers, spills, shared memory, instructions.

    python -m tools.kernel_counts                         # every entry of tools/gpu/entries.py for sm_80, sm_89 and sm_90
    python -m tools.kernel_counts --arch 90 --only u4     # entries in whose names "u4" is found
    python -m tools.kernel_counts --check                 # exit 1 if a gate fails, or a count grew by more than 15 %
    python -m tools.kernel_counts --write                 # into tools/results/kernel_counts.*, and forms into triton_gpu/configs.json

Gates: it compiles; no spills; shared memory fits; the expected matrix instruction does the products; loads and copies of 128 bits.
Instructions per weight are those of a lane in the hot loop, over the weights that the lanes of a program share.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from tools.gpu import machine_code
from tools.gpu.entries import ARCHITECTURES, SHARED, Entry, entries
from tools.gpu.machine_code import MachineCode

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "results" / "kernel_counts.json"
FORMS = ROOT / "backends" / "triton_gpu" / "configs.json"
TOLERANCE = 1.15
WIDE = ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "LDGSTS.E.LTC128B.128", "LDGSTS.E.BYPASS.LTC128B.128", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Counts:
    """What was read of one entry for one architecture.

    `per_weight` is 0 where no hot loop is counted; `instructions` are those of the whole kernel.
    """

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    matrix: str
    wide: int
    instructions: int
    per_weight: float

    @property
    def cost(self) -> float:
        """What may not grow."""
        return self.per_weight or float(self.instructions)


def count(entry: Entry, arch: int) -> Counts:
    code = machine_code.compiled(entry.kernel, entry.signature, entry.constants, arch, entry.warps, entry.stages, entry.odd, entry.fusion)
    return Counts(
        name=entry.name,
        arch=arch,
        registers=code.registers,
        spills=code.spills,
        shared=code.shared,
        matrix=code.matrix,
        wide=sum(each.operation.startswith(WIDE) for each in code.instructions),
        instructions=len(code.instructions),
        per_weight=round(per_weight(code, entry), 3),
    )


def per_weight(code: MachineCode, entry: Entry) -> float:
    """Instructions of the hot loop, of all lanes, over the weights of the iterations in it."""
    if not entry.weights:
        return 0.0
    iterations = sum(each.products for each in code.loop) * entry.warps / entry.products if entry.products else 1.0
    return len(code.loop) * 32 * entry.warps / (entry.weights * iterations)


def failures(counts: Counts, entry: Entry, committed: dict[tuple[str, int], Counts]) -> list[str]:
    """Sentences on the gates that an entry does not pass."""
    name = f"{counts.name} for sm_{counts.arch}"
    wrong = []
    if counts.spills:
        wrong.append(f"{name} spills: {counts.spills} instructions")
    if counts.shared > SHARED[counts.arch]:
        wrong.append(f"{name} takes {counts.shared} bytes of shared memory of {SHARED[counts.arch]}")
    if counts.matrix != entry.matrix:
        wrong.append(f"{name} multiplies by {counts.matrix or 'no matrix instruction'}, not {entry.matrix or 'none'}")
    if not counts.wide:
        wrong.append(f"{name} loads nothing by 128 bits")
    before = committed.get((counts.name, counts.arch))
    if before and counts.cost > TOLERANCE * before.cost:
        wrong.append(f"{name} has {counts.cost} instructions where {before.cost} were committed")
    return wrong


def table(found: Iterable[Counts]) -> Table:
    shown = Table("kernel", *HEAD)
    for each in found:
        shown.add_row(each.name, *cells(each))
    return shown


HEAD = ("sm", "per weight", "instructions", "registers", "spills", "shared KB", "matrix", "128-bit loads")


def cells(counts: Counts) -> list[str]:
    return [
        str(counts.arch),
        f"{counts.per_weight:.2f}" if counts.per_weight else "",
        str(counts.instructions),
        str(counts.registers),
        str(counts.spills),
        f"{counts.shared / 1024:.1f}",
        counts.matrix,
        str(counts.wide),
    ]


def markdown(found: Iterable[Counts]) -> str:
    lines = ["# Kernels, counted in their machine code", "", "`python -m tools.kernel_counts --write`; no GPU was used.", ""]
    lines += ["| kernel | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join([each.name, *cells(each)]) + " |" for each in found)]) + "\n"


def write(new: list[Counts]) -> None:
    """The results, with new ones in their places, and the forms that `select` chooses from; its timed entries stay."""
    given = {(entry.name, arch): entry for arch in ARCHITECTURES for entry in entries(arch)}
    known = committed() | {(each.name, each.arch): each for each in new}
    found = [known[key] for key in given if key in known]
    RESULTS.write_text(json.dumps([asdict(each) for each in found], indent=0) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    forms = [
        {"arch": each.arch, "bits": entry.bits, "per_weight": each.per_weight, "registers": each.registers, "shared": each.shared}
        | {"config": asdict(entry.config)}
        for each in found
        if (entry := given[each.name, each.arch]).config is not None and not failures(each, entry, {})
    ]
    timed = json.loads(FORMS.read_text(encoding="utf-8"))["timed"]
    rows = ",\n".join(json.dumps(row) for row in forms)
    FORMS.write_text('{"forms": [\n' + rows + '\n],\n"timed": ' + json.dumps(timed) + "}\n", encoding="utf-8")


def committed() -> dict[tuple[str, int], Counts]:
    rows = [Counts(**row) for row in json.loads(RESULTS.read_text(encoding="utf-8"))] if RESULTS.is_file() else []
    return {(row.name, row.arch): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="entries in whose name this expression is found")
    parser.add_argument("--json", action="store_true", help="print counts as JSON")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    given = {(entry.name, arch): entry for arch in options.arch for entry in entries(arch) if re.search(options.only, entry.name)}
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(pool.map(_counted, given))
    found = [each for each in results if isinstance(each, Counts)]
    wrong = [each for each in results if isinstance(each, str)]
    if options.write:
        write(found)
    if options.json:
        print(json.dumps([asdict(each) for each in found]))
    else:
        Console(width=120).print(table(found))
    wrong += [reason for each in found for reason in failures(each, given[each.name, each.arch], committed())]
    print("\n".join(wrong), file=sys.stderr)
    if options.check and wrong:
        sys.exit(1)


def _counted(key: tuple[str, int]) -> Counts | str:
    """In a process of the pool, which makes its own entries: kernels are not sent between processes. A sentence if it does not compile."""
    name, arch = key
    try:
        return count(next(entry for entry in entries(arch) if entry.name == name), arch)
    except TritonError as error:
        return f"{name} for sm_{arch} does not compile: {str(error)[:500]}"


if __name__ == "__main__":
    main()
