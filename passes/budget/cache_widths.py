"""Which width each key and value of a cache gets under one budget: what every option costs the model and takes, and the choice."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ir import edit, knapsack
from ir.cache import CacheSite
from ir.cache_code import CacheCode, compute
from ir.errors import OptionError
from ir.knapsack import Option
from passes.base import Context
from passes.data.gradients import total_gradients
from passes.memo.packed import numbers
from passes.units import NATS

Codes = Sequence[CacheCode | None]  # what a site may become; None stays in floating point


def token_bits(site: CacheSite, code: CacheCode | None) -> int:
    """Bits that a site keeps for each token, scales and zero points counted; of floats those of their dtype."""
    dtype = edit.value(site.past).dtype
    return 8 * (site.heads * site.width * dtype.itemsize if code is None else code.token_bytes(site))


def elements(sites: Sequence[CacheSite]) -> int:
    """Elements that the cache keeps for each token."""
    return sum(site.heads * site.width for site in sites)


def check_budget(options: Mapping[CacheSite, Codes], bits: float) -> None:
    """Refuse a budget in bits an element that nothing fits into.

    Raises:
        OptionError: names the least that works.
    """
    least = sum(min(token_bits(site, code) for code in codes) for site, codes in options.items())
    count = elements(list(options))
    if least > int(bits * count + 1e-6):
        nearest = -(-1000 * least // count) / 1000
        raise OptionError(
            f"no choice of widths fits into {bits} bits an element, scales and zero points counted",
            where="quantize_cache(widths=...)",
            remedy=f"the least budget is bits={nearest}, or give smaller widths",
        )


def choose(
    gm: GraphModule, ctx: Context, options: Mapping[CacheSite, Codes], bits: float, tokens: int, seed: int
) -> dict[CacheSite, CacheCode | None]:
    """The option of every site with the least predicted loss together, by an exact knapsack; told in the report's notes and tables.

    Args:
        gm: the graph, its cache in floating point.
        ctx: with calibration data.
        options: of each site.
        bits: budget, an element.
        tokens: that gradients are taken from.
        seed: of what is drawn for them.
    """
    costs = predicted(gm, ctx, options, tokens, seed)
    table = [
        [Option(cost, token_bits(site, code)) for cost, code in zip(costs[site], codes, strict=True)] for site, codes in options.items()
    ]
    count = elements(list(options))
    choice = knapsack.solve(table, int(bits * count + 1e-6))
    average = choice.size / count
    ctx.notes.append(f"quantize_cache: {average:.3f} bits an element of the cache, {choice.cost:.4g} {NATS} predicted")
    made: dict[CacheSite, CacheCode | None] = {}
    rows = []
    for (site, codes), pick in zip(options.items(), choice.picks, strict=True):
        made[site] = code = codes[pick]
        kept = {"site": site.name, "encoding": "" if code is None else str(code.encoding), "bytes a token": token_bits(site, code) // 8}
        rows.append(kept | {f"predicted, {NATS}": costs[site][pick]})
    ctx.tables["cache"] = rows
    return made


def predicted(gm: GraphModule, ctx: Context, options: Mapping[CacheSite, Codes], tokens: int, seed: int) -> dict[CacheSite, list[float]]:
    """`½ E[Σ g² Δ²]` for every option, nats a token: `g` the gradient of a sampled log likelihood at new keys or values, `Δ` what their
    rounding leaves, summed over heads and channels.

    The diagonal of the Fisher information, as of `output_sensitivity`. Gradients and errors are paired token by token, so that tokens which
    all others attend to count as they do.
    """
    at = {site.new: (place, codes) for place, (site, codes) in enumerate(options.items())}

    def zeros() -> list[Tensor]:
        return [torch.zeros(len(codes), dtype=torch.float64) for codes in options.values()]

    def take(sums: Sequence[Tensor], node: Node, x: Tensor, gradient: Tensor) -> None:
        place, codes = at[node]
        weights = gradient.double().square()
        for index, code in enumerate(codes):
            if code is not None:
                errors = (x - code.decode(code.encode(x, compute), x.dtype, compute)).double()
                sums[place][index] += (weights * errors.square()).sum()

    def found() -> list[float]:
        sums, seen = total_gradients(gm, ctx, list(at), zeros, take, tokens, seed)
        return [0.5 * total / max(seen, 1) for totals in sums for total in totals.tolist()]

    made = ctx.memo.kept("costs of widths", found, numbers(sum(map(len, options.values()))))
    costs = iter(made)
    return {site: [next(costs) for _ in codes] for site, codes in options.items()}
