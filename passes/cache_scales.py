"""Static scales of a cache: what keys and values look like on the calibration data, and the codes that follow."""

from collections.abc import Sequence

from torch.fx import GraphModule

from ir import numerics
from ir.cache import CacheSite
from ir.cache_code import CacheCode
from ir.encoding import Encoding
from ir.statistics import Statistics
from passes.base import Context
from passes.data import observation
from passes.memo.packed import STATISTICS


def observed(gm: GraphModule, ctx: Context, sites: Sequence[CacheSite]) -> Statistics:
    """Extremes of every channel of every head, by the names of the sites, in one streaming run over the calibration data."""
    names = {site.new: site.name for site in sites}

    def measured() -> Statistics:
        return observation.statistics(gm, ctx, names, "quantize_cache", sketch=False, form=lambda value: value.transpose(1, 2).flatten(2))

    return ctx.memo.kept("statistics of the cache", measured, STATISTICS)


def static_code(site: CacheSite, encoding: Encoding, statistics: Statistics, packed: bool) -> CacheCode:
    """A code whose scales cover what was observed: per channel of a head, per head, or for all heads of the layer."""
    seen = statistics[site.name]
    low, high = (bound.reshape(1, site.heads, 1, site.width) for bound in (seen.minimum, seen.maximum))
    alike = [axis for axis, size in enumerate(encoding.block_shape(tuple(low.shape))) if size > 1]  # axes that share a scale
    if alike:
        low, high = low.amin(alike, keepdim=True), high.amax(alike, keepdim=True)
    qparams = numerics.qparams_from_range(low.clamp_max(0), high.clamp_min(0), encoding)
    return CacheCode(encoding, qparams.scale, qparams.zero_point, packed)
