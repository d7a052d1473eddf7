"""`Ranks`: the processes that work on one compile together, on one machine or several; one process is the trivial case.

They run the same passes on the same graph and share out calibration batches and layers. Only tensors and JSON travel: nothing is pickled.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from ir.errors import OptionError, RanksError

K = TypeVar("K")
T = TypeVar("T")
LANES = 8  # runs of batches whose sums are added in order: up to as many processes find the bits that one finds
PIECE = 1 << 24  # elements that travel at a time
PATIENCE = 3600.0  # seconds
REMEDY = "if another process has failed, look at what it said; then give the same command again"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is.

    Batches lie in lanes, at most eight runs of neighbours. A lane belongs to one process, lanes to processes in turn. A sum over batches is
    the sum of each lane in its order, added in the order of lanes, however many processes there are; only with more than eight are lanes
    as many as they are.

    Args:
        rank: of this process, from 0.
        world: how many there are.
        started: the process group is our own, and `close` ends it.
    """

    rank: int = 0
    world: int = 1
    started: bool = False

    @classmethod
    def from_environment(cls, timeout: float = PATIENCE) -> "Ranks":
        """The process group there is; else the one that the variables of torchrun tell of, on gloo, and for tensors on GPUs on NCCL.

        Args:
            timeout: seconds after which a process that does not answer counts as lost. One that has ended is missed at once.

        Raises:
            OptionError: variables that torchrun does not set so.
            RanksError: the processes do not find one another.
        """
        known = sys.modules.get("torch.distributed")
        if known is None or not known.is_available() or not known.is_initialized():
            if _number("WORLD_SIZE", 1) < 2:
                return cls()
            return cls._started(timeout)
        return cls(known.get_rank(), known.get_world_size())

    @classmethod
    def _started(cls, timeout: float) -> "Ranks":
        import torch.distributed as dist  # noqa: PLC0415 (a run of one process needs none of it)

        rank, world, gpus = _number("RANK", -1), _number("WORLD_SIZE", 1), torch.cuda.is_available()
        if not 0 <= rank < world or "MASTER_ADDR" not in os.environ:
            raise OptionError(f"this is process {rank} of {world}", where="RANK, WORLD_SIZE, MASTER_ADDR", remedy="start with torchrun")
        if gpus:
            torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
        with _together():
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout))
        return cls(rank, world, started=True)

    def close(self) -> None:
        """Leave the group, if it is our own."""
        if self.started:
            import torch.distributed as dist  # noqa: PLC0415

            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, prints and shows progress."""
        return self.rank == 0

    def lanes(self, count: int) -> list[range]:
        """Runs of neighbours of `count` batches; process `lane % world` has a lane."""
        lanes = min(count, max(LANES, self.world))
        return [range(count * lane // lanes, count * (lane + 1) // lanes) for lane in range(lanes)]

    def owners(self, count: int) -> list[int]:
        """The process that has each of `count` batches."""
        return [lane % self.world for lane, batches in enumerate(self.lanes(count)) for _ in batches]

    def share(self, count: int) -> list[int]:
        """Which of `count` batches are this process's own."""
        return [index for index, owner in enumerate(self.owners(count)) if owner == self.rank]

    def total(self, count: int, zeros: Callable[[], Sequence[Tensor]], take: Callable[[int, Sequence[Tensor]], None]) -> list[Tensor]:
        """Sums over batches, on all processes: of the same bits for up to eight, each of the same kind and with as many threads.

        Memory: the sums twice, in one process and in several.

        Args:
            count: of batches.
            zeros: makes the sums of nothing.
            take: adds what a batch has to sums, in place; it is called for the batches of `share`, in order.
        """
        lanes, fold, sums = self.lanes(count), _Fold(self.world), list(zeros())
        for first in range(0, len(lanes), self.world):
            parts = list(zeros()) if first else sums
            for index in lanes[first + self.rank] if first + self.rank < len(lanes) else ():
                take(index, parts)
            if self.world > 1:
                fold.add(parts, min(self.world, len(lanes) - first))
            elif first:
                for total, part in zip(sums, parts, strict=True):
                    total.add_(part)
        if lanes and self.world > 1:
            fold.result(sums)
        return sums

    def dealt(self, work: Mapping[K, float]) -> dict[K, int]:
        """A process for each item, so that all have about as much to do: the most work goes first, to who has least."""
        load, found = [0.0] * self.world, dict.fromkeys(work, 0)
        for item in sorted(work, key=lambda item: -work[item]):
            found[item] = min(range(self.world), key=lambda rank: load[rank])
            load[found[item]] += work[item]
        return found

    def collect(self, owners: Sequence[int], own: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The tensors of all items, on all processes.

        Args:
            owners: the process that has each item.
            own: of the items that are this one's, in order.
        """
        mine = iter(own)
        return [self._sent(next(mine) if owner == self.rank else {}, owner) for owner in owners]

    def everyone(self, value: T) -> list[T]:
        """What each process says, plain data; nobody goes on before all have said it."""
        found = self.collect(range(self.world), [{"": _bytes(json.dumps(value).encode())}])
        return [json.loads(said[""].numpy().tobytes()) for said in found]

    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds, plain data, on all."""
        (said,) = self.collect([0], [{"": _bytes(json.dumps(find()).encode())}] if self.first else [])
        found: T = json.loads(said[""].numpy().tobytes())
        return found

    def given(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """What the first process has, if it has any, on all."""
        if self.world == 1 or not self.told(lambda: tensors is not None):
            return tensors if self.world == 1 else None
        return self.collect([0], [tensors or {}] if self.first else [])[0]

    def agree(self, value: Any, what: str) -> None:
        """Refuse to go on where processes were given different things.

        Raises:
            RanksError: names the first that was.
        """
        found = self.everyone(value) if self.world > 1 else []
        other = next((rank for rank, said in enumerate(found) if said != found[0]), None)
        if other is not None:
            raise RanksError(f"process {other} has another {what} than process 0", remedy="start all processes in the same way")

    def _sent(self, tensors: Mapping[str, Tensor], owner: int) -> dict[str, Tensor]:
        """The owner's tensors."""
        if self.world == 1:
            return dict(tensors)
        import torch.distributed as dist  # noqa: PLC0415

        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = _bytes(safetensors.torch.save(own)) if owner == self.rank else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(data))
        with _together():
            dist.broadcast(size, owner)
            data = data if owner == self.rank else torch.empty(int(size), dtype=torch.uint8)
            for piece in torch.split(data, 4 * PIECE):
                dist.broadcast(piece, owner)
        return dict(tensors) if owner == self.rank else safetensors.torch.load(data.numpy().tobytes())


class _Fold:
    """Sums of tensors over lanes, in the order of lanes; while they are made every process has a part of each tensor."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.parts: dict[tuple[int, int], Tensor] = {}  # by tensor and piece

    def add(self, tensors: Sequence[Tensor], lanes: int) -> None:
        """Add the lanes of the first `lanes` processes."""
        import torch.distributed as dist  # noqa: PLC0415

        for key, piece in self._pieces(tensors):
            sent = torch.nn.functional.pad(piece, (0, -len(piece) % self.world))
            came = torch.empty_like(sent)
            with _together():
                dist.all_to_all_single(came, sent)
            for part in came.view(self.world, -1)[:lanes]:
                if key in self.parts:
                    self.parts[key].add_(part)
                else:
                    self.parts[key] = part.clone()

    def result(self, tensors: Sequence[Tensor]) -> None:
        """Write the sums into tensors."""
        import torch.distributed as dist  # noqa: PLC0415

        for key, piece in self._pieces(tensors):
            part = self.parts.pop(key)
            found = [torch.empty_like(part) for _ in range(self.world)]
            with _together():
                dist.all_gather(found, part)
            piece.copy_(torch.cat(found)[: len(piece)])

    @staticmethod
    def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for number, tensor in enumerate(tensors):
            for place, piece in enumerate(torch.split(tensor.view(-1), PIECE)):
                yield (number, place), piece


@contextmanager
def _together() -> Iterator[None]:
    """Say what a failure of communication means."""
    try:
        yield
    except RuntimeError as error:
        raise RanksError(f"another process of this run has ended or does not answer: {str(error)[:300]}", remedy=REMEDY) from error


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _number(name: str, otherwise: int) -> int:
    """A variable of the environment."""
    text = os.environ.get(name, "")
    if text and not text.lstrip("-").isdecimal():
        raise OptionError(f"{text!r} is no number", where=name, remedy="start with torchrun")
    return int(text or otherwise)
