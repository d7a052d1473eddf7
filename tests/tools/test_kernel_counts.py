"""Compiles a few kernels for GPUs, which needs none, in a process without the interpreter; the whole table is the tool's."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tools import kernel_counts
from tools.gpu import machine_code
from tools.gpu.entries import ARCHITECTURES, Entry, entries
from tools.kernel_counts import Counts

COMPILED = {"TRITON_INTERPRET": "0"}
# instructions per weight on Hopper that kernels stay under
LIMITS = {
    "packed_linear u4 fp16 M8": 2.07,
    "packed_linear u4 fp16 M16": 2.40,
    "packed_linear u4 fp16 M64": 2.7,
    "packed_linear u2 fp16 M8": 1.64,
    "packed_linear u8 fp16 M8": 2.9,
    "packed_linear u3 fp16 M8 N64": 2.96,
}


def _run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, env=os.environ | COMPILED)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_kernel_compiles_for_every_architecture_and_passes_the_gates() -> None:
    found = [Counts(**row) for row in json.loads(_run("tools.kernel_counts", "--only", "u4 fp16 M8$", "--json", "--check", "--jobs", "1"))]
    assert [each.arch for each in found] == list(ARCHITECTURES)
    assert all(1 < each.per_weight < LIMITS[each.name] and each.matrix == "HMMA" for each in found)


def test_launchers_compile_what_they_launch_and_not_again_for_other_tokens() -> None:
    lines = _run("tests.backends.triton_gpu.kernels.dry_launch", "linears").splitlines()
    split = ["linear_kernel 1 2 2", "sum_kernel 1 1 1"]
    assert lines == [*split, *split, *["dequantize_kernel 2 4 1"] * 2, "compiled 3"]


def test_integer_kernels_are_compiled_once_for_all_numbers_of_tokens() -> None:
    lines = _run("tests.backends.triton_gpu.kernels.dry_launch", "integers").splitlines()
    names = [line.partition(" ")[0] for line in lines]
    block = ["rows_kernel", "hadamard_kernel", "linear_kernel", "sum_kernel", "quantize_kernel", "dequantize_kernel"]
    assert names == [*block, *block, "compiled"] and lines[-1] == "compiled 6"


def test_committed_counts_are_of_the_entries_and_under_their_limits() -> None:
    committed = kernel_counts.committed()
    given = {(entry.name, arch): entry for arch in ARCHITECTURES for entry in entries(arch)}
    assert set(committed) == set(given)
    assert not [reason for key, counts in committed.items() for reason in kernel_counts.failures(counts, given[key], {})]
    assert all(committed[name, 90].per_weight <= limit for name, limit in LIMITS.items())


GOOD = Counts("kernel", 89, 100, 0, 90 << 10, "HMMA", 4, 500, 2.0)
ENTRY = Entry("kernel", None, {}, {}, matrix="HMMA")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"spills": 3}, "spills"),
        ({"shared": 100 << 10}, "shared memory"),
        ({"matrix": ""}, "no matrix instruction"),
        ({"wide": 0}, "128 bits"),
        ({"per_weight": 2.31}, "where 2.0 were committed"),
    ],
)
def test_every_gate_says_what_is_wrong(changed: dict[str, object], reason: str) -> None:
    committed = {("kernel", 89): GOOD}
    assert not kernel_counts.failures(GOOD, ENTRY, committed)
    (wrong,) = kernel_counts.failures(replace(GOOD, **changed), ENTRY, committed)
    assert reason in wrong


SASS = """
.L_x_0:
        /*0100*/                   LDG.E.128 R4, [R2] ;
.L_x_1:
        /*0110*/                   LOP3.LUT R8, R4, 0xf000f, R9, 0xea, !PT ;
        /*0120*/              @!P1 HMMA.16816.F32 R12, R8, R16, R12 ;
        /*0130*/               @P0 BRA `(.L_x_1) ;
        /*0140*/                   STL [R1], R12 ;
        /*0150*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0160*/                   BRA `(.L_x_2);
"""


def test_the_hot_loop_is_the_innermost_that_multiplies() -> None:
    code = machine_code.MachineCode(tuple(machine_code.parsed(SASS)), 32, 0)
    assert [each.operation for each in code.loop] == ["LOP3.LUT", "HMMA.16816.F32", "BRA"]
    assert (code.matrix, code.spills, code.loop[1].products) == ("HMMA", 1, 16 * 8 * 16)
    entry = replace(ENTRY, warps=1, weights=256, products=16 * 8 * 16)
    assert kernel_counts.per_weight(code, entry) == 3 * 32 / 256
