"""Memory that was freed, back to the system, by the C library."""

import ctypes
import gc
import sys

MMAP_THRESHOLD = -3  # mallopt's number of it
LARGE = 1 << 18  # bytes


def map_large() -> None:
    """Let glibc map every large tensor by itself, so that its pages go as it goes. Elsewhere nothing.

    By default it takes up to 32 MB from its heap, once tensors of that size have been freed, and tensors that stay there hold the pages
    around them: memory then grows with every layer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """Let the C library return the pages that nothing is on; glibc keeps them, and tensors of growing sizes leave many. Elsewhere nothing.

    Takes milliseconds: for the end of long work, not for loops over small tensors.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
