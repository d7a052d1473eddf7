"""Memory that was freed, back to the system, by the C library."""

import ctypes
import gc
import sys
import time

MMAP_THRESHOLD = -3  # mallopt's number of it
LARGE = 1 << 18  # bytes
SHARE = 0.02  # of the time is spent on giving back, at most

_due = [0.0]  # the moment from which it is time again


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

    Graphs die in cycles, and to find these takes tenths of a second. So calls soon after one another do nothing: work that takes long is
    followed by a look, and many short compiles do not wait for it.
    """
    began = time.perf_counter()
    if began < _due[0]:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    now = time.perf_counter()
    _due[0] = now + (now - began) / SHARE
