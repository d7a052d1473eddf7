"""Channel scales and clipping ratios learned by gradient on the error of quantized layers.

T1 and T2 of 2606.09927; clipping goes beyond. `passes.learn` learns within the whole model; this is the layer-wise protocol of the paper.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ir.errors import DataError, OptionError
from ir.smoothing import centred, output_error, rounded, transformed

RATES = tuple(5e-3 * 4 ** (i / 4) for i in range(5))  # logspace(5e-3, 2e-2, 5)


@dataclass(frozen=True)
class Layer:
    """What the scales of one tensor and its readers are learned from.

    Args:
        X: tokens to learn from, `[tokens, in]`.
        W: `[out, in]`; several readers' rows concatenated.
        held: other tokens, `[tokens, in]`: the step to keep, when to stop and the learning rate are chosen on these.
        start: the first scales, `[in]`; 1 if None.
    """

    X: Tensor
    W: Tensor
    held: Tensor
    start: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {self.X.shape[-1], self.W.shape[-1], self.held.shape[-1], *([len(self.start)] if self.start is not None else [])}
        if len(sizes) > 1 or not len(self.X) or not len(self.held):
            raise DataError(f"a layer's tokens, held-out tokens, weight and start are of the same channels, not {sorted(sizes)}")


@dataclass(frozen=True)
class Learned:
    """What was learned for one layer, and its relative error `Ẽ` on the held-out tokens.

    Args:
        s: `[in]`, of geometric mean 1.
        clip_x: the share of each token's maximum that is kept.
        clip_w: the share of each output channel's maximum, `[out]`.
        error: `Ẽ` on all held-out tokens.
    """

    s: Tensor
    clip_x: Tensor
    clip_w: Tensor
    error: float


@dataclass(frozen=True)
class Recipe:
    """How scales are learned: AdamW without decay on `log s`, whose mean is kept at zero, since the error does not see a common factor.

    Args:
        bits_x: activation bits, None to leave it as it is.
        bits_w: weight bits, likewise. One more than will be used stands for an error-aware rounding, which halves the weight's error.
        hadamard: rotate after scaling.
        clip: learn clipping ratios too, as `log` ratios: one per activation, one per output channel.
        steps: at most so many.
        rate: the learning rate, reached after `warmup` steps, then a cosine to zero.
        warmup: steps of linear warm-up.
        patience: stop after so many steps without a better held-out error.
        every: steps between two looks at the held-out tokens.
        batch: tokens of one step, drawn without replacement until all are seen; all if None.
        seed: of the order of tokens.
    """

    bits_x: int | None = 4
    bits_w: int | None = 4
    hadamard: bool = True
    clip: bool = False
    steps: int = 800
    rate: float = 1e-2
    warmup: int = 5
    patience: int = 80
    every: int = 5
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.every < 1 or (self.batch is not None and self.batch < 1):
            raise OptionError("steps are at least 0, the rate, `every` and the batch positive", where=str(self))


class _Parameters:
    """`log s`, and the logarithms of both clipping ratios, of one layer."""

    def __init__(self, layer: Layer, recipe: Recipe) -> None:
        self.layer, self.recipe = layer, recipe
        start = torch.ones_like(layer.W[0]) if layer.start is None else centred(layer.start.to(layer.W))
        self.log_s = start.log().requires_grad_()
        self.log_x = torch.zeros((), dtype=layer.W.dtype, device=layer.W.device).requires_grad_(recipe.clip)
        self.log_w = torch.zeros_like(layer.W[:, 0]).requires_grad_(recipe.clip)

    def all(self) -> list[Tensor]:
        """What the optimizer changes."""
        return [p for p in (self.log_s, self.log_x, self.log_w) if p.requires_grad]

    def error(self, X: Tensor) -> Tensor:
        """`Ẽ` on tokens `X`."""
        W, recipe = self.layer.W, self.recipe
        X_hat, W_hat = transformed(X, W, (self.log_s - self.log_s.mean()).exp(), recipe.hadamard)
        X_hat = rounded(X_hat, recipe.bits_x, self.log_x.exp())
        W_hat = rounded(W_hat, recipe.bits_w, self.log_w.exp())
        return output_error(X @ W.T, X_hat @ W_hat.T)[1]

    def learned(self, error: float) -> Learned:
        """A copy of what they stand for."""
        return Learned(centred(self.log_s.detach().exp()), self.log_x.detach().exp(), self.log_w.detach().exp(), error)


def learn(layers: Sequence[Layer], recipe: Recipe | None = None) -> list[Learned]:
    """Minimise the mean of `Ẽ` over `layers`; of every layer the step with the least held-out error is kept, its start among them.

    Deterministic in the recipe's seed. No result is worse than its start on the held-out tokens.

    Raises:
        DataError: an error that is not finite.
    """
    recipe = Recipe() if recipe is None else recipe
    parameters = [_Parameters(layer, recipe) for layer in layers]
    optimizer = torch.optim.AdamW([p for each in parameters for p in each.all()], lr=recipe.rate, weight_decay=0.0)
    batches = [_batches(layer.X, recipe) for layer in layers]
    best = [each.learned(math.inf) for each in parameters]
    least, waited = math.inf, 0
    for step in range(recipe.steps + 1):
        if step % recipe.every == 0 or step == recipe.steps:
            with torch.no_grad():
                errors = [float(each.error(layer.held)) for each, layer in zip(parameters, layers, strict=True)]
            if not all(map(math.isfinite, errors)):
                raise DataError("the error of a layer is not finite", remedy="look at its input, its weight and the first scales")
            best = [each.learned(e) if e < b.error else b for each, e, b in zip(parameters, errors, best, strict=True)]
            waited = 0 if sum(errors) < least else waited + recipe.every
            least = min(least, sum(errors))
            if waited >= recipe.patience:
                break
        if step == recipe.steps:
            break
        optimizer.param_groups[0]["lr"] = recipe.rate * _schedule(step, recipe)
        optimizer.zero_grad()
        loss = torch.stack([each.error(next(batch)) for each, batch in zip(parameters, batches, strict=True)]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return best


def learn_best(layers: Sequence[Layer], recipe: Recipe, rates: Sequence[float] = RATES) -> tuple[Recipe, list[Learned]]:
    """The learning rate with the least mean held-out error, as a recipe to replay on other layers, and what it found."""
    found = [(replace(recipe, rate=rate), learn(layers, replace(recipe, rate=rate))) for rate in rates]
    return min(found, key=lambda pair: sum(each.error for each in pair[1]))


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


def _batches(X: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches of tokens, every epoch in an order of its own."""
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.batch is None or recipe.batch >= len(X):
        while True:
            yield X
    while True:
        order = torch.randperm(len(X), generator=generator).to(X.device)
        yield from (X[rows] for rows in torch.split(order, recipe.batch) if len(rows) == recipe.batch)
