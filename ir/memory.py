"""Memory that was freed, back to the system."""

import ctypes
import gc
import sys


def give_back() -> None:
    """Let the C library return the pages that nothing is on; glibc keeps them, and tensors of growing sizes leave many. Elsewhere nothing.

    Takes milliseconds: for the end of long work, not for loops over small tensors.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
