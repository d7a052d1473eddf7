"""Sequences of passes that keep the function and make a model easier to round: what presets take as `transform`."""

from ir.errors import OptionError
from passes.balance_channels import BalanceChannels
from passes.base import Pass
from passes.canonicalize import Canonicalize
from passes.center_norm import CenterNorm
from passes.fold_norm import FoldNorm
from passes.learn import Learn
from passes.rotate_channels import RotateChannels
from passes.smooth_channels import SmoothChannels
from passes.untie import Untie

# What every map of channels needs: norms without gains and means, and a weight of its own for every layer.
OPENED = (Canonicalize(), Untie(), FoldNorm(), CenterNorm())
OFFLINE, ONLINE = RotateChannels(("R1", "R2")), RotateChannels(("R4",))
MLP = ("mlp",)
OFFLINE_ONLY: dict[str, tuple[Pass, ...]] = {"rotate": (*OPENED, OFFLINE), "none": (Canonicalize(),)}  # nothing is added to the graph

# Before the annotations are made, and after. Smoothing comes before the rotation online that its channels go through.
TRANSFORMS: dict[str, tuple[tuple[Pass, ...], tuple[Pass, ...]]] = {
    "none": ((Canonicalize(),), ()),
    "rotate": (OPENED, (RotateChannels(),)),
    "smoothrot": (OPENED, (SmoothChannels(where=MLP), RotateChannels())),
    "quantile": (OPENED, (SmoothChannels(search=True, rotated=True, where=MLP), RotateChannels())),
    "balance": (OPENED, (RotateChannels(("R1",)), BalanceChannels(online=True))),
    "learned": (OPENED, (OFFLINE, Learn(), ONLINE)),
}


def transformed(name: str, marks: Pass) -> tuple[Pass, ...]:
    """The passes of a transform around the pass that annotates.

    Raises:
        OptionError: no such transform.
    """
    if name not in TRANSFORMS:
        raise OptionError(f"there is no transform {name!r}", where="transform=...", remedy=f"there are {list(TRANSFORMS)}")
    before, after = TRANSFORMS[name]
    return (*before, marks, *after)
