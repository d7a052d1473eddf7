"""Hadamard matrices of every order that Sylvester's, Paley's and Kronecker's constructions reach, and the transform by them.

All matrices made here are symmetric, so orthonormal ones are their own inverse: the transform undoes itself and is its own gradient.

    Sylvester (1867)   H₂ₙ = [1 1; 1 −1] ⊗ Hₙ
    Paley I (1933)     order q + 1 for a prime power q ≡ 3 mod 4: a border of ones around −1 where a + b is a square, 1 where it is not
    Paley II           order 2(q + 1) for a prime power q ≡ 1 mod 4: C ⊗ [1 1; 1 −1] + I ⊗ [1 −1; −1 −1], C = [0 1; 1 χ(a − b)]
    Kronecker          orders multiply

Orders that no construction here reaches (92, 116, 156, 172 … are known by others) are done in blocks: `largest_block`.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from ir.errors import OptionError
from ir.numerics import compute_dtype

WHOLE = 128  # greatest order that is applied as one matrix: up to here, one product is no slower than two and their reshapes


@functools.lru_cache(maxsize=1024)
def exists(n: int) -> bool:
    """Whether `hadamard(n)` can be made."""
    return n in {1, 2} or (n > 0 and n % 4 == 0 and (_paley(n) is not None or _kronecker(n) is not None))


def largest_block(n: int) -> int:
    """The greatest order that divides `n` and can be made: `n` itself, or the block of a block-diagonal transform.

    Raises:
        OptionError: `n` is not positive.
    """
    if n < 1:
        raise OptionError(f"a transform has a positive number of channels, not {n}")
    return next(n // m for m in range(1, n + 1) if n % m == 0 and exists(n // m))


def misfit(channels: int, block: int) -> str:
    """Why `channels` channels cannot be transformed in blocks of `block`, and which block can; empty if they can."""
    if block > 0 and channels % block == 0 and exists(block):
        return ""
    reason = f"{block} does not divide {channels}" if block < 1 or channels % block else f"no Hadamard matrix of order {block} can be made"
    best = max((b for b in range(1, channels + 1) if channels % b == 0 and exists(b)), key=lambda b: (-abs(b - block), b), default=1)
    return f"{reason}; the nearest block for {channels} channels is {best}"


def orders(n: int) -> tuple[int, ...]:
    """The orders of `factors(n)`, greatest first: `n` alone, or the two whose sum, the cost of the transform, is least.

    Raises:
        OptionError: no matrix of order `n` can be made.
    """
    if not exists(n):
        raise OptionError(
            f"no Hadamard matrix of order {n} can be made", remedy=f"use blocks of {largest_block(n)}" if n > 0 else "orders are positive"
        )
    pairs = [(n // b, b) for b in range(2, math.isqrt(n) + 1) if n % b == 0 and exists(b) and exists(n // b)] if n > WHOLE else []
    return min(pairs, key=sum, default=(n,))


def factors(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Orthonormal symmetric matrices whose Kronecker product, in this order, is `hadamard(n)`.

    Raises:
        OptionError: no matrix of order `n` can be made.
    """
    return tuple((_signs(order).double() / math.sqrt(order)).to(dtype) for order in orders(n))


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix of order `n`: `[n, n]`, entries ±1/√n; Sylvester's for powers of two.

    Raises:
        OptionError: no matrix of order `n` can be made; names the greatest block that can.
    """
    signs = functools.reduce(torch.kron, map(_signs, orders(n)))
    return (signs.double() / math.sqrt(n)).to(dtype)


def transform(x: Tensor, block: int) -> Tensor:
    """`y = x Hᵀ` with `H = hadamard(block)` for every run of `block` channels of the last axis; shape and dtype as `x`, its own inverse.

    With `H = A ⊗ B` and a run as a matrix `X [a, b]`, `y = A X B`: a + b multiplications a channel instead of a · b. Computed in float32,
    or float64 for float64.

    Raises:
        OptionError: `block` does not divide the last axis, or no matrix of that order can be made; names the nearest that can.
    """
    if reason := misfit(x.shape[-1], block):
        raise OptionError(reason)
    *left, right = _cached_factors(block, compute_dtype(x.dtype), x.device)
    sizes = (len(left[0]), len(right)) if left else (len(right),)
    y = x.to(right.dtype).reshape(*x.shape[:-1], x.shape[-1] // block, *sizes) @ right
    y = left[0] @ y if left else y
    return y.reshape(x.shape).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _cached_factors(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # what is kept here may meet a gradient later
        return tuple(factor.to(device) for factor in factors(block, dtype))


def random_orthogonal(n: int, seed: int) -> Tensor:
    """An orthogonal matrix `[n, n]`, float64, uniform by Haar's measure: Q of a Gaussian matrix, R's diagonal made positive."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q, R = torch.linalg.qr(gaussian)
    unique: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return unique


def random_hadamard(n: int, seed: int) -> Tensor:
    """`hadamard(n) · diag(±1)`, float64: orthogonal, not symmetric.

    Raises:
        OptionError: no matrix of order `n` can be made.
    """
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return hadamard(n) * signs


def _signs(n: int) -> Tensor:
    """An unscaled matrix, int8 `[n, n]`."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if n == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    found = _paley(n) if n & (n - 1) else None  # powers of two are Sylvester's
    if found is not None:
        return _paley_second(found) if found % 4 == 1 else _paley_first(found)
    pair = _kronecker(n)
    assert pair is not None
    return torch.kron(_signs(pair[0]), _signs(pair[1]))


def _kronecker(n: int) -> tuple[int, int] | None:
    """Two smaller orders whose product is `n`, the first as small as can be."""
    return next(((d, n // d) for d in range(2, math.isqrt(n) + 1) if n % d == 0 and exists(d) and exists(n // d)), None)


def _paley(n: int) -> int | None:
    """The prime power from which Paley makes a matrix of order `n`, a multiple of 4."""
    if _prime_power(n - 1):
        return n - 1
    q = n // 2 - 1
    return q if q % 4 == 1 and _prime_power(q) else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """`p, k` with `q = pᵏ`, for an odd `q`."""
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = round(math.log(q, p)) if p > 1 else 0
    return (p, k) if k and p**k == q else None


def _paley_first(q: int) -> Tensor:
    squares = _characters(q, 1) >= 0
    return torch.nn.functional.pad(torch.where(squares, -1, 1).to(torch.int8), (1, 0, 1, 0), value=1)


def _paley_second(q: int) -> Tensor:
    conference = torch.nn.functional.pad(_characters(q, -1), (1, 0, 1, 0), value=1)
    conference[0, 0] = 0
    ones, corner = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, ones) + torch.kron(torch.eye(q + 1, dtype=torch.int8), corner)


def _characters(q: int, sign: int) -> Tensor:
    """χ(a + sign · b) for all a, b of the field of `q` elements, int8 `[q, q]`; its elements are numbers of k digits in base p."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    index = torch.zeros(q, q, dtype=torch.int64)
    for place in (p**i for i in range(k)):
        digit = torch.arange(q) // place % p
        index += (digit[:, None] + sign * digit) % p * place
    return _character(p, k)[index]


def _character(p: int, k: int) -> Tensor:
    """The quadratic character χ of the field of `q = pᵏ` elements, int8 `[q]`: 0 at 0, 1 at squares, −1 elsewhere.

    Squares are the even powers of a generator. Here the generator is x, modulo the first polynomial xᵏ − Σ tᵢ xⁱ for which the powers of x
    take q − 1 values (a shift register of maximal length), which also proves that the residues form a field.
    """
    for taps in itertools.product(range(1, p), *[range(p)] * (k - 1)):
        found, power, sign = [0] * p**k, (1, *[0] * (k - 1)), 1
        while found[at := sum(digit * p**i for i, digit in enumerate(power))] == 0:
            found[at], sign = sign, -sign
            power = tuple((lower + power[-1] * tap) % p for lower, tap in zip((0, *power), taps, strict=False))
        if found.count(0) == 1:
            return torch.tensor(found, dtype=torch.int8)
    raise AssertionError(f"every field has a generator: {p}, {k}")
