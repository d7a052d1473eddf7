"""`quantize_cache`: keep keys and values in 2 to 8 bits, in one width or in several under one budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from ir.cache import CacheSite, cache_sites
from ir.cache_code import CacheCode, recode
from ir.encoding import Encoding, Float, Int
from ir.errors import CoverageError, DataError, OptionError
from ir.packing import container, per_byte
from ir.schemes import FLOAT
from ir.signature import CACHE, CACHE_PARTS, Signature
from ir.statistics import Statistics
from passes.base import Context, Effect, Pass
from passes.budget.cache_widths import check_budget, choose
from passes.cache_scales import observed, static_code
from passes.cache_support import clash, refusals

WIDTHS = (*range(2, 9), FLOAT)


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Keep keys and values as integers, several to a byte, or 8-bit floats, in the cache that the graph takes in and gives out.

    Before::

        %k_all = aten.cat([%past, %k], -2); return [.., %k_all]

    After::

        %1 = fxpress.choose_qparams(%k, 'u4[1,-1]dynamic', float16); %s = getitem(%1, 0); %z = getitem(%1, 1)
        %2 = fxpress.quantize(%k, %s, %z, ...); %3 = fxpress.pack(%2, ...)
        %codes = aten.cat([%past, %3], -2); %scales = aten.cat([%past_scale, %s], -2); %zeros = aten.cat([%past_zero_point, %z], -2)
        %4 = fxpress.unpack(%codes, ...); %k_all = fxpress.dequantize(%4, %scales, %zeros, ...); return [.., %codes, %scales, %zeros]

    Attention reads what the cache holds, in prefill as in decode. Each token of each head has a scale in float16, computed at run time;
    static scales, one per head or layer, come from one streaming run over the calibration data and take no place in the cache.

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
        tensor: static scales are one for the keys of a layer and one for its values, in place of one per head.
        floats: 8-bit floats, `f8e4m3`, in place of integers.
        symmetric: without zero points, which take a byte per token and head; floats have none.
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
    tensor: bool = False
    floats: bool = False
    symmetric: bool = False
    group: int = -1
    clip: float = 1.0
    widths: tuple[int, ...] = ()
    tokens: int = 8192
    seed: int = 0
    effect: ClassVar[Effect] = Effect.CHANGE
    targeted: ClassVar[bool] = True

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
        if self.tensor and (self.dynamic or self.channels):
            raise OptionError(
                "a scale of a whole layer is static, not per channel", where="quantize_cache(tensor=True)", remedy="dynamic=False"
            )
        if self.floats and any(width not in (8, FLOAT) for part in CACHE_PARTS for width in self._widths(part)):
            raise OptionError("floats have 8 bits", where="quantize_cache(floats=True)", remedy="leave out bits, or floats")
        if self.group != -1 and (self.group < 2 or not self.dynamic or self.channels):
            reason = "has at least 2 elements, or is -1" if self.group < 2 else "is of dynamic scales; static ones are per head or channel"
            raise OptionError(f"a group {reason}", where=f"quantize_cache(group={self.group})")
        if not 0 < self.clip <= 1 or (self.clip < 1 and not self.dynamic):
            raise OptionError("a clip is a share of dynamic ranges, above 0 and up to 1", where=f"quantize_cache(clip={self.clip})")
        if all(self._widths(part) == (FLOAT,) for part in CACHE_PARTS):
            raise OptionError("nothing is quantized at 16 bits", where="quantize_cache", remedy="leave the pass out")

    def _widths(self, part: str) -> tuple[int, ...]:
        """What keys or values may get."""
        own = self.keys if part == "key" else self.values
        return self.widths or (int(self.bits) if own is None else own,)

    def encoding(self, part: str, bits: int) -> Encoding:
        """The encoding of keys or values `[batch, heads, tokens, width]`."""
        dynamic = self.dynamic and not (self.channels and part == "key")
        static = (-1,) if self.tensor else (-1, 1, -1, 1 if self.channels and part == "key" else -1)
        number = Float(4, 3) if self.floats else Int(bits)
        clip = self.clip if dynamic else 1.0
        return Encoding(number, (1, self.group) if dynamic else static, self.symmetric or self.floats, dynamic, clip)

    @property
    def _static(self) -> bool:
        quantized = [part for part in CACHE_PARTS if self._widths(part) != (FLOAT,)]
        return not self.dynamic or (self.channels and "key" in quantized)

    def needs(self, ctx: Context) -> None:
        """Calibration data, if a scale is static or widths are chosen; a cache that the backend keeps so, as far as can be told yet."""
        if self.widths and not ctx.calibration:
            raise DataError("widths of a cache are chosen on calibration data", remedy="pass calibration=[batch, ...], or leave widths out")
        if self._static and not ctx.calibration:
            raise DataError("static scales of a cache need calibration data", remedy="pass calibration=[batch, ...], or dynamic scales")
        if ctx.original is not None:
            known = {name: site for name, site in cache_sites(ctx.original) if isinstance(site, CacheSite)}
            self._check(*self._possible(known, ctx), ctx)

    def requires(self, gm: GraphModule, ctx: Context) -> None:
        """A cache, all of it understood unless a part may be left; and a budget that something fits into."""
        signature: Signature = gm.meta["signature"]
        if not signature.layers:
            raise CoverageError("the model keeps no key/value cache", remedy="leave quantize_cache out: it is for decoders")
        sites, left = self._possible(dict(cache_sites(gm)), ctx)
        self._check(sites, left, ctx)
        if self.widths:
            # Sizes are those of any scales: static ones take no place.
            check_budget({site: [self._code(site, bits, None) for bits in widths] for site, widths in sites.items()}, self.bits)

    def _possible(self, found: Mapping[str, CacheSite | str], ctx: Context) -> tuple[dict[CacheSite, list[int]], dict[str, str]]:
        """The sites to quantize, with the widths that each may get, and why others that were asked for are left."""
        sites: dict[CacheSite, list[int]] = {}
        left: dict[str, str] = {}
        for name, site in found.items():
            if self._widths(name.rpartition(".")[2]) == (FLOAT,):
                continue
            if isinstance(site, str):
                left[name] = site
                continue
            reasons = self._reasons(site, ctx)
            possible = [bits for bits, reason in reasons.items() if reason is None]
            if any(bits != FLOAT for bits in possible):
                sites[site] = possible
            else:
                left[name] = next(str(reason) for bits, reason in reasons.items() if bits != FLOAT)
        return sites, left

    def _reasons(self, site: CacheSite, ctx: Context) -> dict[int, str | None]:
        """Why a site cannot have a width, by width; None if it can."""
        widths = {part: self._widths(part) for part in CACHE_PARTS}
        if self.group != -1 and site.width % self.group:
            reason = f"heads have {site.width} elements, not a multiple of the group of {self.group}"
            return {bits: None if bits == FLOAT else reason for bits in widths[site.part]}
        return dict.fromkeys(widths[site.part]) if ctx.backend is None else refusals(site, widths, self.encoding, ctx.backend)

    def _check(self, sites: Mapping[CacheSite, list[int]], left: Mapping[str, str], ctx: Context) -> None:
        """Refuse sites that are left, unless some may be, and widths that the backend does not keep beside one another."""
        if left and (not ctx.allow_partial or not sites):
            name, reason = next(iter(left.items()))
            others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise CoverageError(
                f"{CACHE}.{name} cannot be quantized{others}: {reason}",
                where=f"{CACHE}.{name}",
                remedy="allow_partial=True leaves it as it is" if sites else "leave quantize_cache out",
            )
        if ctx.backend is not None and (apart := clash(sites, self.encoding, ctx.backend)):
            raise CoverageError(
                f"widths of keys and values do not go together: {apart}", where="quantize_cache", remedy="one width for both"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Quantize every site; inputs, outputs, example, probe and calibration data follow."""
        sites, left = self._possible(dict(cache_sites(gm)), ctx)
        for name, reason in left.items():
            ctx.skip(f"{CACHE}.{name}", reason, 0, asked=True)
            ctx.notes.append(f"{CACHE}.{name} is kept in floating point: {reason}")
        if not sites:
            return 0
        statistics = observed(gm, ctx, list(sites)) if self._static else Statistics()
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
        return static_code(site, encoding, statistics, packed)

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
