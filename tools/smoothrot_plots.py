"""Plots of `bench_smoothrot`; matplotlib is needed for these alone (`pip install matplotlib`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ir.smoothing import Policy, layer_error, transformed
from tools.smoothrot_families import Place

ALPHAS = [0.25 + 0.0625 * i for i in range(9)]
TAILS = [0.05, 0.02, 0.01, 0.006, 0.002, 5e-4, 0.0]


def draw(out: Path, name: str, errors: Mapping[str, Sequence[float]], at: Place, s: Tensor, start: Policy) -> list[Path]:
    """Write `smoothrot-{name}.png` into `out`: errors by layer, the map of policies, learned against first scales, channel magnitudes.

    Args:
        errors: `E` of every place by family.
        at: the place whose scales are shown.
        s: learned scales of that place.
        start: the policy that they were learned from.
    """
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (optional)
        from PIL import Image  # noqa: PLC0415 (comes with it)
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8))
    panel = SimpleNamespace(layers=axes[0, 0], map=axes[0, 1], learned=axes[1, 0], channels=axes[1, 1])

    for family, values in errors.items():
        panel.layers.plot(values, marker="o", markersize=3, linewidth=1, label=family)
    panel.layers.set(title="error of each layer, test tokens", xlabel="layer", ylabel="E", ylim=(0, None))
    panel.layers.legend(fontsize=6)

    X = at.held[:768]
    E = [[float(layer_error(X, at.W, at.scales(Policy(alpha, 1 - tail)))[0]) for tail in TAILS] for alpha in ALPHAS]
    image = panel.map.imshow(E, aspect="auto", origin="lower", cmap="viridis")
    panel.map.set(title=f"E of policies, {at.path}", xlabel="q", ylabel="α")
    panel.map.set_xticks(range(len(TAILS)), [f"{1 - tail:g}" for tail in TAILS], fontsize=7)
    panel.map.set_yticks(range(len(ALPHAS)), [f"{alpha:.2f}" for alpha in ALPHAS], fontsize=7)
    figure.colorbar(image, ax=panel.map)

    panel.learned.loglog(at.scales(start), s, ".", markersize=3)
    panel.learned.set(title=f"learned against first scales, {at.path}", xlabel=f"α = {start.alpha}, q = {start.q:.4f}", ylabel="learned")

    with torch.no_grad():
        after = transformed(at.held, at.W, s)[0]
    order = at.held.abs().amax(0).argsort(descending=True)
    panel.channels.semilogy(at.held.abs().amax(0)[order], linewidth=1, label="as it is")
    panel.channels.semilogy((at.held / s).abs().amax(0)[order], linewidth=0.6, label="scaled")
    panel.channels.semilogy(after.abs().amax(0), linewidth=0.6, label="scaled and rotated")
    panel.channels.set(title=f"greatest |x| of each channel, {at.path}", xlabel="channel, by size")
    panel.channels.legend(fontsize=7)

    for axis in axes.flat:
        axis.title.set_fontsize(9)
    figure.tight_layout()
    path = out / f"smoothrot-{name}.png"
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size
    return [path]
