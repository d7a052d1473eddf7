"""Gradient descent on what a calibration set says, with a part of it held out to choose on."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ir.errors import DataError
from passes.base import Context
from passes.data.calibration import take_rows
from passes.memo.loops import State

T = TypeVar("T")
Loss = Callable[[T], Tensor]
WARM_UP = 10  # steps
LOOKS = 4  # at what is held out


def split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """What is learned from, and every eighth item, or the last of fewer, which is held out."""
    places = set(range(7, len(items), 8)) or {len(items) - 1}
    return [item for place, item in enumerate(items) if place not in places], [items[place] for place in sorted(places)]


def needs_two(ctx: Context, name: str) -> None:
    """Refuse calibration data in fewer than two batches: one to learn from, one to hold out."""
    if len(ctx.calibration) < 2:
        problem = f"{name} needs two batches of calibration data, not {len(ctx.calibration)}"
        raise DataError(problem, remedy="pass calibration=[{'input_ids': ids}, ...], and split the data in more batches")


def shuffled(items: Sequence[T], seed: int) -> Iterator[tuple[T, torch.Generator]]:
    """The items in random orders, one after the other without end, and the generator that drew them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(items), generator=generator).tolist():
            yield items[index], generator


def some_rows(batch: Sequence[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """Some samples of a batch."""
    return take_rows(batch, torch.randperm(len(batch[0]), generator=generator)[:count])


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Loss[T],
    samples: Iterator[T],
    held: Sequence[T],
    *,
    rate: float,
    steps: Callable[[State], Iterable[int]],
    count: int,
) -> float:
    """Adam with warm-up and cosine decay. The parameters end at the best of their start and four later looks at what is held out.

    Args:
        parameters: those that need no gradient are left.
        loss: of one item.
        samples: items to learn from, at least `count`.
        held: items to choose on.
        rate: the greatest learning rate.
        steps: the numbers of the steps from 0, as the loop goes on from a state.
        count: how many there are.

    Returns:
        The loss on what is held out.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    best, kept = torch.tensor(_mean(loss, held), dtype=torch.float64), [parameter.detach().clone() for parameter in wanted]
    if not wanted:
        return float(best)
    optimizer = torch.optim.Adam(wanted, betas=(0.9, 0.95))
    looks = {-(-count * look // LOOKS) for look in range(1, LOOKS + 1)}
    for step in steps(State([best, *kept, *wanted], optimizer, samples=samples)):
        optimizer.param_groups[0]["lr"] = rate * rate_at(step, count)
        optimizer.zero_grad()
        loss(next(samples)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step + 1 in looks and (found := _mean(loss, held)) < best:
            best.fill_(found)
            _copy(wanted, kept)
    _copy(kept, wanted)
    return float(best)


@torch.no_grad()
def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for value, tensor in zip(values, into, strict=True):
        tensor.copy_(value)


def rate_at(step: int, count: int) -> float:
    """The share of the greatest learning rate at a step of `count`: warm-up, then a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / count))


@torch.no_grad()
def _mean(loss: Loss[T], items: Sequence[T]) -> float:
    found = float(torch.stack([loss(item) for item in items]).mean())
    return found if math.isfinite(found) else math.inf
