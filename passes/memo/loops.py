"""`State`: what a long loop changes from step to step, so that a run which was killed goes on with the same bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ir.errors import DataError
from passes.memo.folder import Tensors
from passes.memo.packed import same_kind


@dataclass
class State:
    """What a loop changes from step to step.

    Args:
        tensors: changed in place.
        optimizer: whose moments are part of it; learning rates are not, the loop sets them.
        generators: of random numbers, beside those that draw samples.
        samples: that the loop takes one of in each step: a run that goes on draws and drops those of the steps that are done.
    """

    tensors: Sequence[Tensor]
    optimizer: torch.optim.Optimizer | None = None
    generators: Sequence[torch.Generator] = ()
    samples: Iterator[object] = field(default_factory=lambda: iter(()))

    def tensors_at(self, step: int) -> Tensors:
        """All of it, after so many steps."""
        found = {f"tensor.{index}": tensor for index, tensor in enumerate(self.tensors)}
        found |= {f"generator.{index}": generator.get_state() for index, generator in enumerate(self.generators)}
        for index, moments in self._moments().items():
            found |= {f"moment.{index}.{name}": value for name, value in moments.items()}
        return found | {"step": torch.tensor(step)}

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {} if self.optimizer is None else self.optimizer.state_dict()["state"]
        return found

    def restore(self, held: Tensors, count: int) -> int:
        """Put all of it back; returns the steps that are done.

        Raises:
            DataError: it is of another loop; nothing is changed then.
        """
        step = int(held["step"])
        tensors = [held[f"tensor.{index}"] for index in range(len(self.tensors))]
        generators = [held[f"generator.{index}"] for index in range(len(self.generators))]
        for own, found in zip(self.tensors, tensors, strict=True):
            same_kind(own, found)
        for generator, found in zip(self.generators, generators, strict=True):
            same_kind(generator.get_state(), found)
        if not 0 <= step <= count:
            raise DataError(f"a loop of {count} steps is not at step {step}")
        if self.optimizer is not None:
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in held.items():
                if name.startswith("moment."):
                    _, index, part = name.split(".", 2)
                    moments.setdefault(int(index), {})[part] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        with torch.no_grad():
            for own, found in zip(self.tensors, tensors, strict=True):
                own.copy_(found)
        for generator, found in zip(self.generators, generators, strict=True):
            generator.set_state(found)
        return step
