"""`Deferred`: a tensor that is made when it is written, and forgotten after."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ir.errors import DataError
from ir.store import Store

READ = 4  # bytes of other tensors, at most, that are read to make one: codes of two bits are made of bytes


@dataclass(frozen=True)
class Deferred:
    """A tensor to write, a `Source` of files of tensors.

    Args:
        dtype: its dtype.
        shape: its shape.
        make: returns it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The whole, made now.

        Raises:
            DataError: it is made otherwise than it was announced.
        """
        made = self.make().detach()
        if (made.dtype, tuple(made.shape)) != (self.dtype, self.shape):
            raise DataError(f"{made.dtype} {list(made.shape)} was made where {self.dtype} {list(self.shape)} was announced")
        yield made

    @classmethod
    def of(cls, tensor: Tensor) -> "Deferred":
        """A tensor that there is already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def counted(tensor: Deferred, store: Store | None) -> Deferred:
    """The same, whose making counts as reading a store's tensors, which releases what was read before every so often."""
    if store is None:
        return tensor

    def make() -> Tensor:
        store.count(READ * tensor.nbytes)
        return tensor.make()

    return replace(tensor, make=make)
