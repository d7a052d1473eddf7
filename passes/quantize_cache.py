"""`quantize_cache`: keep keys and values in 2 to 8 bits, in one width or in several under one budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from ir import numerics
from ir.cache import CacheSite, cache_sites
from ir.cache_code import CacheCode, recode
from ir.encoding import Encoding, Int
from ir.errors import CoverageError, DataError, OptionError
from ir.packing import container, per_byte
from ir.schemes import FLOAT
from ir.signature import CACHE, Signature
from ir.statistics import Statistics
from passes.base import Context, Effect, Pass
from passes.cache_widths import check_budget, choose
from passes.observation import watch

WIDTHS = (*range(2, 9), FLOAT)


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keep keys and values as integers, several to a byte, in the cache that the graph takes in and gives out.

    Before::

        %k_all = aten.cat([%past, %k], -2); return [.., %k_all]

    After::

        %1 = fxpress.choose_qparams(%k, 'u4[1,-1]dynamic', float16); %s = getitem(%1, 0); %z = getitem(%1, 1)
        %2 = fxpress.quantize(%k, %s, %z, ...); %3 = fxpress.pack(%2, ...)
        %codes = aten.cat([%past, %3], -2); %scales = aten.cat([%past_scale, %s], -2); %zeros = aten.cat([%past_zero_point, %z], -2)
        %4 = fxpress.unpack(%codes, ...); %k_all = fxpress.dequantize(%4, %scales, %zeros, ...); return [.., %codes, %scales, %zeros]

    Attention reads what the cache holds, in prefill as in decode. Each token of each head has a scale in float16, computed at run time;
    static scales, one per head, come from one streaming run over the calibration data and take no place in the cache.

    With `widths`, keys and values of every layer get one of these, so that the predicted loss of all together is the least that the budget
    `bits` allows: `½ E[Σ g² Δ²]` nats a token, `g` the gradient of a sampled log likelihood at new keys or values (the diagonal of the
    Fisher information), `Δ` what their rounding leaves. An exact knapsack chooses.

    Args:
        bits: of keys and values, 2 to 8; 16 leaves them as they are. With `widths`, the budget: bits an element of the cache on average, as
            they are stored, with scales and zero points; an element that is left in float32 takes 32.
        keys: bits of keys, if they differ.
        values: bits of values, likewise.
        dynamic: scales at run time; else from calibration data.
        channels: keys get a static scale per channel of a head, whatever `dynamic` says of values: outliers of keys lie in channels
            (KIVI, arXiv 2402.02750, section 3).
        symmetric: without zero points, which take a byte per token and head.
        group: elements of a head that share a dynamic scale; -1 for the whole head.
        clip: share of the extremes that dynamic scales cover; beyond it values are clipped, which can pay off at two bits.
        widths: to choose among, each 2 to 8, or 16 for what is left as it is.
        tokens: of the calibration data, that gradients are taken from to choose.
        seed: of what is drawn for them.

    Limits: (1) 3 bits are kept in 4, 5 to 7 in 8; (2) where the width of a head is not a multiple of the codes in a byte, a byte holds one
    code; (3) a cache is found where new tokens are appended to past ones, old tokens dropped by slices; any other is left, with a reason;
    (4) interactions between keys and values, and between layers, are not predicted.

    Raises:
        OptionError: bits, or a combination of options, that there is not; a budget that nothing fits into, with the least that works.
        CoverageError: the model keeps no cache, or keeps some of it in a way that is not understood or not supported by the backend.
        DataError: static scales, or widths, without calibration data.
    """

    bits: float = 8.0
    keys: int | None = None
    values: int | None = None
    dynamic: bool = True
    channels: bool = False
    symmetric: bool = False
    group: int = -1
    clip: float = 1.0
    widths: tuple[int, ...] = ()
    tokens: int = 8192
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        named: list[tuple[str, object]] = [*(("widths", width) for width in self.widths), ("keys", self.keys), ("values", self.values)]
        if not self.widths:
            named.append(("bits", int(self.bits) if self.bits in WIDTHS else self.bits))
        for name, given in named:
            if given is not None and (type(given) is not int or given not in WIDTHS):
                remedy = "give 2 to 8, or 16 to leave floats; a budget in between needs widths=(2, 4, 8, 16)"
                raise OptionError(f"{name}={given!r}", where="quantize_cache", remedy=remedy)
        if self.widths and (self.keys is not None or self.values is not None):
            problem = "widths of keys and values are given or chosen, not both"
            raise OptionError(problem, where="quantize_cache", remedy="leave out keys and values, or widths")
        if self.widths and not (isinstance(self.bits, int | float) and self.bits > 0 and self.tokens > 0):
            raise OptionError("a budget of bits, and tokens, are positive", where="quantize_cache(widths=...)")
        if self.group != -1 and (self.group < 2 or not self.dynamic or self.channels):
            reason = "has at least 2 elements, or is -1" if self.group < 2 else "is of dynamic scales; static ones are per head or channel"
            raise OptionError(f"a group {reason}", where=f"quantize_cache(group={self.group})")
        if not 0 < self.clip <= 1 or (self.clip < 1 and not self.dynamic):
            raise OptionError("a clip is a share of dynamic ranges, above 0 and up to 1", where=f"quantize_cache(clip={self.clip})")
        if all(self._widths(part) == (FLOAT,) for part in ("key", "value")):
            raise OptionError("nothing is quantized at 16 bits", where="quantize_cache", remedy="leave the pass out")

    def _widths(self, part: str) -> tuple[int, ...]:
        """What keys or values may get."""
        own = self.keys if part == "key" else self.values
        return self.widths or (int(self.bits) if own is None else own,)

    def encoding(self, part: str, bits: int) -> Encoding:
        """The encoding of keys or values `[batch, heads, tokens, width]`."""
        dynamic = self.dynamic and not (self.channels and part == "key")
        block = (1, self.group) if dynamic else (-1, 1, -1, 1 if self.channels and part == "key" else -1)
        return Encoding(Int(bits), block, symmetric=self.symmetric, dynamic=dynamic, clip=self.clip if dynamic else 1.0)

    @property
    def _static(self) -> bool:
        quantized = [part for part in ("key", "value") if self._widths(part) != (FLOAT,)]
        return not self.dynamic or (self.channels and "key" in quantized)

    def needs(self, ctx: Context) -> None:
        """Calibration data, if a scale is static or widths are chosen."""
        if self.widths and not ctx.calibration:
            raise DataError("widths of a cache are chosen on calibration data", remedy="pass calibration=[batch, ...], or leave widths out")
        if self._static and not ctx.calibration:
            raise DataError("static scales of a cache need calibration data", remedy="pass calibration=[batch, ...], or dynamic scales")

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """A cache, all of it understood unless a part may be left; and a budget that something fits into."""
        signature: Signature = gm.meta["signature"]
        if not signature.layers:
            raise CoverageError("the model keeps no key/value cache", remedy="leave quantize_cache out: it is for decoders")
        sites, left = self._found(gm, ctx)
        if left and (not ctx.allow_partial or not sites):
            name, reason = next(iter(left.items()))
            others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise CoverageError(
                f"{CACHE}.{name} cannot be quantized{others}: {reason}",
                where=f"{CACHE}.{name}",
                remedy="allow_partial=True leaves it as it is" if sites else "leave quantize_cache out",
            )
        if self.widths:
            # Sizes are those of any scales: static ones take no place.
            check_budget({site: [self._code(site, bits, None) for bits in widths] for site, widths in sites.items()}, self.bits)

    def _found(self, gm: GraphModule, ctx: Context) -> tuple[dict[CacheSite, list[int]], dict[str, str]]:
        """The sites to quantize, with the widths that each may get, and why others that were asked for are left."""
        sites: dict[CacheSite, list[int]] = {}
        left: dict[str, str] = {}
        for name, found in cache_sites(gm):
            widths = self._widths(name.rpartition(".")[2])
            if widths == (FLOAT,):
                continue
            if isinstance(found, str):
                left[name] = found
                continue
            reasons = {bits: self._refusal(found, ctx, bits) for bits in widths if bits != FLOAT}
            possible = [bits for bits in widths if reasons.get(bits) is None]
            if any(bits != FLOAT for bits in possible):
                sites[found] = possible
            else:
                left[name] = str(next(iter(reasons.values())))
        return sites, left

    def _refusal(self, site: CacheSite, ctx: Context, bits: int) -> str | None:
        if self.group != -1 and site.width % self.group:
            return f"heads have {site.width} elements, not a multiple of the group of {self.group}"
        if ctx.backend is None:
            return None
        return ctx.backend.supports("Cache", {site.part: self.encoding(site.part, bits)}, (site.heads, site.width))

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Quantize every site; inputs, outputs, example, probe and calibration data follow."""
        sites, left = self._found(gm, ctx)
        for name, reason in left.items():
            ctx.skip(f"{CACHE}.{name}", reason, 0, asked=True)
            ctx.notes.append(f"{CACHE}.{name} is kept in floating point: {reason}")
        if not sites:
            return 0
        statistics = _observed(gm, ctx, list(sites)) if self._static else Statistics()
        options = {site: [self._code(site, bits, statistics) for bits in widths] for site, widths in sites.items()}
        if self.widths:
            chosen = choose(gm, ctx, options, self.bits, self.tokens, self.seed)
        else:
            chosen = {site: codes[0] for site, codes in options.items()}
        plan = [(site, code) for site, code in chosen.items() if code is not None]
        before = gm.meta["signature"].token_bytes
        ctx.rebind(recode(gm, plan))
        self._note(ctx, plan, before, gm.meta["signature"].token_bytes)
        return len(plan)

    def _code(self, site: CacheSite, bits: int, statistics: Statistics | None) -> CacheCode | None:
        """How a site is kept, with its scales if they are static and known; None for floats."""
        if bits == FLOAT:
            return None
        encoding = self.encoding(site.part, bits)
        packed = site.width % per_byte(encoding) == 0
        if encoding.dynamic or statistics is None:
            return CacheCode(encoding, packed=packed)
        seen = statistics[site.name]
        low, high = (bound.reshape(1, site.heads, 1, site.width) for bound in (seen.minimum, seen.maximum))
        if encoding.block[-1] == -1:
            low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
        qparams = numerics.qparams_from_range(low.clamp_max(0), high.clamp_min(0), encoding)
        return CacheCode(encoding, qparams.scale, qparams.zero_point, packed)

    @staticmethod
    def _note(ctx: Context, plan: Sequence[tuple[CacheSite, CacheCode]], before: int, after: int) -> None:
        """State what the cache takes, and what is kept wider than asked for."""
        ctx.notes.append(f"key/value cache: {after} bytes a token in place of {before}, {before / after:.2f} times less")
        for part, encoding in sorted({(site.part, code.encoding) for site, code in plan}, key=str):
            if container(encoding) != encoding.bits:
                ctx.notes.append(f"{encoding.bits}-bit {part}s are kept in {container(encoding)} bits each")
            odd = sorted({site.width for site, code in plan if (site.part, code.encoding) == (part, encoding) and not code.packed})
            if odd:
                ctx.notes.append(f"{part}s of width {odd} are kept one to a byte: {per_byte(encoding)} does not divide the width")


def _observed(gm: GraphModule, ctx: Context, sites: Sequence[CacheSite]) -> Statistics:
    """What new keys and values look like on the calibration data: extremes of every channel of every head, in one streaming run."""
    names = {site.new: site.name for site in sites}
    statistics = Statistics()

    def take(node: Node, value: Tensor) -> None:
        statistics.observe(names[node], value.transpose(1, 2).flatten(2), sketch=False)

    watch(gm, ctx, names, take, "quantize_cache")
    return statistics
