"""The inline assembly, which the interpreter cannot run, by a reader of its few instructions."""

import pytest
import torch

from backends.triton_gpu import layout
from backends.triton_gpu.kernels import codes
from ir.errors import OptionError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Registers:
    """Runs assembly on 32-bit registers, each a tensor of int64; two numbers of 16 bits in one are taken apart for arithmetic."""

    def __init__(self, dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> None:
        self.dtype, self.held = dtype, dict(inputs)

    def run(self, text: str) -> None:
        for line in text.split("\n"):
            operation, _, operands = line.rstrip(";").partition(" ")
            if operation in {"{", "}", ".reg"}:
                continue
            to, *given = operands.split(", ")
            values = [self.held[name] if name in self.held else torch.tensor(int(name, 0)) for name in given]
            self.held[to] = OPERATIONS[operation.split(".")[0]](self, *values) & 0xFFFFFFFF

    def numbers(self, register: torch.Tensor) -> torch.Tensor:
        """float64 `[2, …]` of the lower and the upper half."""
        halves = torch.stack([register & 0xFFFF, register >> 16])
        return torch.where(halves >= 2**15, halves - 2**16, halves).to(torch.int16).view(self.dtype).double()

    def register(self, numbers: torch.Tensor) -> torch.Tensor:
        halves = numbers.to(self.dtype).view(torch.int16).long() & 0xFFFF
        return halves[0] | halves[1] << 16

    def fma(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a, b, c = torch.broadcast_tensors(a, b, c)
        return self.register(self.numbers(a) * self.numbers(b) + self.numbers(c))

    def lop3(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(a)
        for case in range(8):
            bits = [operand if case >> place & 1 else ~operand for operand, place in ((a, 2), (b, 1), (c, 0))]
            found |= (bits[0] & bits[1] & bits[2]) * (int(table) >> case & 1)
        return found

    def prmt(self, a: torch.Tensor, b: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        both = a | b << 32
        return sum((both >> 8 * (int(selected) >> 4 * byte & 0xF) & 0xFF) << 8 * byte for byte in range(4))


OPERATIONS = {
    "mov": lambda _, a: a,
    "shr": lambda _, a, by: a >> by,
    "shl": lambda _, a, by: a << by,
    "lop3": Registers.lop3,
    "prmt": Registers.prmt,
    "fma": Registers.fma,
}


def _tiles(bits: int, dtype: str, offset: float, packed: torch.Tensor) -> torch.Tensor:
    """What the assembly makes of codes `[N, span]`, `[N, span]`."""
    text, constraints = codes.assembly(bits, dtype, offset)
    words = [word.view(torch.int16).long() & 0xFFFF for plane in layout.pack(packed, bits, 16) for word in plane]
    outputs = codes.span(bits) // layout.LANES
    assert constraints == ",".join(["=r"] * outputs + ["r"] * len(words))
    registers = Registers(DTYPES[dtype], {f"${outputs + i}": word[:, 0::2] | word[:, 1::2] << 16 for i, word in enumerate(words)})
    registers.run(text)
    # [N, 16] pairs to [N, 32]
    return torch.cat([registers.numbers(registers.held[f"${i}"]).movedim(0, -1).flatten(1) for i in range(outputs)], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_become_numbers_exactly(bits: int, dtype: str) -> None:
    given = torch.stack([(torch.arange(codes.span(bits)) * 37 + 11 * n) % 2**bits for n in range(2**bits + 3)]).to(torch.uint8)
    for offset in {2.0 ** (bits - 1), 0.0, 2.0**bits - 1} | ({0.5} if bits < 7 else set()):
        assert torch.equal(_tiles(bits, dtype, offset, given), given.double() - offset)


def test_a_word_of_four_bits_is_shifted_once_for_float16() -> None:
    text, _ = codes.assembly(4, "float16", 8.0)
    assert [text.count(operation) for operation in ("shr.u32", "lop3.b32", "fma.rn.f16x2")] == [1, 4, 4]


@pytest.mark.parametrize(("bits", "dtype", "offset"), [(4, "float16", 7.3), (8, "bfloat16", 127.5), (7, "bfloat16", 0.5)])
def test_what_is_not_exact_is_refused(bits: int, dtype: str, offset: float) -> None:
    with pytest.raises(OptionError, match=f"codes of {bits} bits less {offset}"):
        codes.assembly(bits, dtype, offset)
