"""Signatures as files state them, which may come from anybody: checked before anything is made of them."""

import math
from collections.abc import Mapping
from typing import Any

from ir.errors import DataError
from ir.signature import CACHE, TOKENS, Port, Signature, output_class

LARGEST = 1 << 24  # elements of the cache that a call makes up for a row: it is empty, but for axes of fixed length


def signature_of(data: Mapping[str, Any]) -> Signature:
    """The signature that `Signature.to_json` wrote, or somebody else.

    Raises:
        DataError: ports without a dtype or of sizes that are none, or names that do not go together.
    """
    try:
        read = Signature.from_json(data)
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"a damaged signature: {error}") from error
    for side in (read.inputs, read.outputs):
        if not side or len({port.name for port in side}) < len(side):
            raise DataError("a signature names every input and every output, once")
        for port in side:
            _check(port)
    returned = {CACHE if port.cached else port.name for port in read.outputs if port.cached or "." not in port.name}
    known = getattr(output_class(read.output_class), "__dataclass_fields__", None) or returned
    if not returned <= set(known) or not set(read.positional) <= set(read.names):
        raise DataError(f"{read.output_class!r} and {list(read.positional)} do not fit the names of a signature")
    return read


def _check(port: Port) -> None:
    """A port's dtype and sizes; a cache's name and what a call makes up for it."""
    sizes = [0 if size is None else size for size in port.shape]
    if any(type(size) is not int or size < 0 for size in sizes) or port.torch_dtype.itemsize == 0:
        raise DataError(f"{list(port.shape)} are no sizes", where=port.name)
    if port.cached and (port.name.count(".") != 2 or len(sizes) <= TOKENS or math.prod(sizes[1:]) > LARGEST):
        raise DataError(f"this is no part of a cache: {list(port.shape)}", where=port.name)
