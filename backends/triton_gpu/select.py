"""Which form of a kernel runs a product: from a table of timed ones, else by a model of what limits it. A pure function, without a GPU.

The model takes the slowest of three: instructions (as `tools/kernel_counts.py` counted them in the machine code), bytes from memory and
products, over the share of the GPU that the tiles fill. It has not been checked against a clock: timed entries go before it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Config:
    """A form of a kernel.

    Attributes:
        kernel: `linear`, products of weights that are taken apart in registers, or `dequantize`, a whole weight and then torch's product.
        tile_m: tokens of a tile.
        tile_n: channels of a tile.
        spans: of `k` in a step, each what whole words of all planes cover.
        depth: tiles of 32 `k` in one product.
        warps: of a program.
        stages: of loads ahead.
        split: parts of `k` that are summed apart, and then in a second kernel.
        before: whether scales multiply weights, rather than sums of a group: less to do for many tokens, but in the activations' dtype,
            where scales below 6e-5 lose digits in float16. No form that is committed does.
    """

    kernel: str = "linear"
    tile_m: int = 8
    tile_n: int = 64
    spans: int = 1
    depth: int = 1
    warps: int = 4
    stages: int = 3
    split: int = 1
    before: bool = False


@dataclass(frozen=True)
class Form:
    """A form that can be chosen, with what was read in its machine code."""

    arch: int
    bits: int
    config: Config
    per_weight: float  # instructions of a lane
    registers: int  # of a thread
    shared: int  # bytes of a program


@dataclass(frozen=True)
class Device:
    """What a GPU of an architecture can do at most."""

    processors: int
    shared: int  # bytes of a processor
    gigahertz: float
    bytes_per_us: float
    products_per_us: float  # multiply-accumulates of 16-bit numbers

    @property
    def issued_per_us(self) -> float:
        """Instructions of a lane, of four schedulers a processor."""
        return self.processors * 4 * 32 * self.gigahertz * 1e3


DEVICES = {  # A100, L40S, H200
    80: Device(108, 163 << 10, 1.41, 1.7e6, 130e6),
    89: Device(142, 99 << 10, 2.2, 0.8e6, 150e6),
    90: Device(132, 227 << 10, 1.75, 4.3e6, 395e6),
}
LIKE = {86: 89, 120: 89, 121: 89}  # as little shared memory
LAUNCH = 2.2  # microseconds of a kernel more, inside a graph
REACHED = {8: 0.35, 16: 0.3}  # share of a device's products that a tile reaches: 8 tokens by another instruction, 16 fill half of one
FUSED, WHOLE = 0.6, 0.85  # of wider tiles, and of torch's
HIDING = 2  # programs that a processor needs to have one's loads behind another's work
FEW = 64  # tokens for which no weight is written out
SPLITS = (1, 2, 4, 8, 16, 32)
REGISTERS, PROGRAMS = 65536, 16  # of a processor


def choose(kernel: str, bits: int, m: int, n: int, k: int, group: int, arch: int) -> Config:
    """The form in which `kernel` multiplies `m` tokens by a weight `[n, k]` of `bits` bits with scales for `group` columns.

    Args:
        kernel: the operator's name, `packed_linear`.
        arch: 80, 89, 90, or another that is `near` one of these.
    """
    if known := timed(kernel, bits, m, n, k, group, arch):
        return known
    arch = near(arch)
    candidates = [(estimate(form, m, n, k, config), config) for form in forms(arch, bits) for config in _split(form.config, k)]
    if m > FEW or not candidates:
        candidates.append((estimate_whole(DEVICES[arch], bits, m, n, k), Config("dequantize")))
    return min(candidates, key=lambda pair: pair[0])[1]


def near(arch: int) -> int:
    """The known architecture whose forms run on another: the nearest below that has no more shared memory."""
    arch = LIKE.get(arch, arch)
    return max((known for known in DEVICES if known <= arch), default=min(DEVICES))


def timed(kernel: str, bits: int, m: int, n: int, k: int, group: int, arch: int) -> Config | None:
    """The form that was fastest on a GPU for so many tokens or the next more that were timed; None if none was."""
    rows = [row for row in _table()["timed"] if _key(row) == (kernel, near(arch), bits, n, k, group) and row["m"] >= m]
    return config_of(min(rows, key=lambda row: int(row["m"]))["config"]) if rows else None


def estimate(form: Form, m: int, n: int, k: int, config: Config) -> float:
    """Microseconds of `config`, which is `form`'s but for its split."""
    device = DEVICES[form.arch]
    tiles_m, tiles_n = ceil(m / config.tile_m), ceil(n / config.tile_n)
    weights = float(tiles_n * config.tile_n * k)
    issue = form.per_weight * weights * tiles_m / device.issued_per_us
    memory = (weights * form.bits / 8 + 2 * m * k + 2 * m * n) / device.bytes_per_us
    products = weights * tiles_m * config.tile_m / (device.products_per_us * REACHED.get(config.tile_m, FUSED))
    programs = tiles_m * tiles_n * config.split / device.processors
    hidden = min(1.0, min(ceil(programs), _resident(form, device)) / HIDING)
    filled = programs / ceil(programs) * hidden
    sums = 0.0 if config.split == 1 else LAUNCH + 8 * config.split * m * n / device.bytes_per_us
    return max(issue, memory, products) / filled + sums


def estimate_whole(device: Device, bits: int, m: int, n: int, k: int) -> float:
    """Microseconds of a weight written as 16-bit numbers, and a product of those."""
    written = n * k * (bits / 8 + 2) / device.bytes_per_us
    product = max(m * n * k / (device.products_per_us * WHOLE), 2 * (n * k + m * k + m * n) / device.bytes_per_us)
    return written + product + LAUNCH


def forms(arch: int, bits: int) -> list[Form]:
    """The forms that were counted for an architecture and a width."""
    return [
        Form(row["arch"], row["bits"], config_of(row["config"]), row["per_weight"], row["registers"], row["shared"])
        for row in _table()["forms"]
        if row["arch"] == arch and row["bits"] == bits
    ]


def config_of(options: dict[str, Any]) -> Config:
    """A `Config` of the fields that a table states."""
    return Config(**{field.name: options[field.name] for field in fields(Config) if field.name in options})


def _split(config: Config, k: int) -> Iterable[Config]:
    """Parts of at least two of the longest steps."""
    return (replace(config, split=split) for split in SPLITS if split == 1 or k >= split * 1024)


def _resident(form: Form, device: Device) -> int:
    by_registers = REGISTERS // (max(form.registers, 1) * form.config.warps * 32)
    return max(1, min(PROGRAMS, by_registers, device.shared // max(form.shared, 1)))


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    return row["kernel"], row["arch"], row["bits"], row["n"], row["k"], row["group"]


@cache
def _table() -> dict[str, Any]:
    text = resources.files("backends.triton_gpu").joinpath("configs.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table
