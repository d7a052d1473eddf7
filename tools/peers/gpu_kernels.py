"""Other kernels for the problems of `tools.gpu.problems`: torch's own, and those of packages, where they are installed.

    pip install gemlite humming-kernels fast-hadamard-transform

None is needed. Marlin has no wheel that goes with this torch; humming continues it. A peer takes a problem and its inputs, and gives calls,
each with a copy of the weight in the peer's own layout. What it does not do is `Absent`, with the reason. Peers tune themselves at their
first call, which is not timed.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ir import numerics
from ir.encoding import Encoding
from ir.hadamard import transform
from tools.gpu.checks import Inputs
from tools.gpu.checks_rows import Rows
from tools.gpu.problems import Problem, Product
from tools.gpu.timing import copies

INNER = 8  # k-tiles of torch's layout of 4-bit weights


class Absent(Exception):  # noqa: N818 (no error)
    """A peer that does not run here, or not this problem, and why."""


@dataclass(frozen=True)
class Prepared:
    """Calls of a peer, how its result becomes comparable, and how far it may be off, relatively."""

    calls: list[Product]
    finished: Callable[[Tensor], Tensor] = lambda y: y
    off: float = 0.02


Peer = Callable[[Problem, Inputs], Prepared]
Rotation = Callable[[Rows, Tensor], Product]


def torch_bf16(problem: Problem, given: Inputs) -> Prepared:
    """torch's product of bfloat16 matrices: what ratios are of."""
    W = problem.case.values(given, torch.arange(problem.N, device=given["x"].device)).to(torch.bfloat16)
    x = problem.activations(given).to(torch.bfloat16)
    turns = [W.clone() for _ in range(copies(W.nbytes))]
    return Prepared([lambda w=w: torch.nn.functional.linear(x, w) for w in turns])


def tinygemm(problem: Problem, given: Inputs) -> Prepared:
    """torch's 4-bit product, which torchao uses: bfloat16, groups of 32 to 256."""
    if (problem.format.bits, problem.case.int8) != (4, False) or problem.case.group not in {32, 64, 128, 256}:
        raise Absent("4-bit weights in groups, and 16-bit activations, alone")
    codes, x = given["codes"], problem.activations(given).to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], INNER)
    scale = given["scale"].to(torch.bfloat16)
    with_zeros = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    turns = [packed.clone() for _ in range(copies(packed.nbytes))]
    return Prepared([lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, problem.case.group, with_zeros) for w in turns])


def int_mm(problem: Problem, given: Inputs) -> Prepared:
    """torch's int8 product, without the scales after it."""
    if (problem.format.bits, problem.case.int8) != (8, True):
        raise Absent("8-bit weights and activations alone")
    if problem.M <= 16:
        raise Absent("torch._int_mm takes more than 16 tokens")
    W = (given["codes"].to(torch.int16) - 128).to(torch.int8)
    turns = [W.clone() for _ in range(copies(W.nbytes))]
    scales = given["input_scale"] * given["scale"]
    return Prepared([lambda w=w: torch._int_mm(given["x"], w.t()) for w in turns], lambda y: y * scales)


def gemlite(problem: Problem, given: Inputs) -> Prepared:
    """gemlite, with the configurations that it brings for its H100 on other Hoppers too; it tunes what is not among them."""
    package, case, device = _gemlite(), problem.case, given["x"].device
    scale = given["scale"].T.contiguous().to(problem.dtype)
    if case.int8:
        if case.bits != 8:
            raise Absent("no 4-bit weights with int8 activations")
        codes = (given["codes"].to(torch.int16) - 128).to(torch.int8)
        layer = package.helper.A8W8_int8_dynamic(device=device, dtype=problem.dtype).from_weights(codes, scales=scale)
    elif case.bits not in {1, 2, 4, 8}:
        raise Absent(f"no {case.bits}-bit weights")
    else:
        zeros = torch.full_like(scale, case.offset)
        layer = package.helper.A16Wn(device=device, dtype=problem.dtype).from_weights(given["codes"], scale, zeros, case.bits, case.group)
    x, kept, how = problem.activations(given), layer.get_tensor_args(), layer.get_meta_args()
    turns = [[each.clone() for each in kept] for _ in range(copies(problem.stored))]
    return Prepared([lambda w=w: package.forward_functional(x, None, w, how) for w in turns])


@cache
def _gemlite():
    package = _imported("gemlite")
    if "h200" in torch.cuda.get_device_name().lower():
        package.load_config(str(Path(package.__file__).parent / "configs" / "h100.json"))
    return package


def humming(problem: Problem, given: Inputs) -> Prepared:
    """humming, which continues Marlin; it rounds the weight itself."""
    layers = _imported("humming.layer")
    case, x = problem.case, problem.activations(given)
    if case.int8:
        raise Absent("not compared with int8 activations")
    config = {"dtype": f"uint{case.bits}", "group_size": 0 if case.group == case.K else case.group}
    layer = layers.HummingLayer(shape_n=problem.N, shape_k=problem.K, weight_config=config, torch_dtype=problem.dtype).to(x.device)
    layer.load_from_unquantized(case.values(given, torch.arange(problem.N, device=x.device)).to(problem.dtype))
    layer.transform()
    turns = [layer, *(copy.deepcopy(layer) for _ in range(copies(problem.stored) - 1))]
    return Prepared([lambda one=one: one(x) for one in turns], off=max(0.05, 2.0**-case.bits))


def _imported(name: str):
    """A package that may be missing, or fail while it is imported."""
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:
        raise Absent(f"not installed: {type(error).__name__}: {error}") from error


PEERS: dict[str, Peer] = {"tinygemm": tinygemm, "torch int8": int_mm, "gemlite": gemlite, "humming": humming}
PACKAGES = ("triton", "gemlite", "humming-kernels", "torchao", "fast-hadamard-transform")


def eager_rotation(case: Rows, x: Tensor) -> Product:
    """Transform, scales and codes, operator by operator."""
    encoding = Encoding.parse(case.encoding)

    def call() -> Tensor:
        y = transform(x, case.block)
        return numerics.quantize(y, numerics.choose_qparams(y, encoding), encoding)

    return call


def compiled_rotation(case: Rows, x: Tensor) -> Product:
    """The same by `torch.compile`."""
    return torch.compile(eager_rotation(case, x), dynamic=False)


def fast_hadamard(case: Rows, x: Tensor) -> Product:
    """The transform alone, by fast-hadamard-transform: orders that are powers of two."""
    package = _imported("fast_hadamard_transform")
    if case.block & (case.block - 1):
        raise Absent("orders are powers of two")
    return lambda: package.hadamard_transform(x.view(-1, case.block), case.block**-0.5)


ROTATIONS: dict[str, Rotation] = {
    "torch eager": eager_rotation,
    "torch.compile": compiled_rotation,
    "fast-hadamard, no quantization": fast_hadamard,
}
