"""Memory of the host between steps: kept by the process instead of handed back to the system.

XLA's CPU programs ask for their temporary memory at every call, in one piece, and glibc maps such a piece anew each
time: the system then fills every page with zeros as it is first touched. Measured with quickstart-dense, whose step
uses 325 MB: 80,000 page faults, 50 to 60 ms of 278. Told to keep what it has, glibc hands out the same pages again.
"""

import ctypes
import os

from jaxlm.compilation import may_use_gpu

# mallopt's names and values, from malloc.h: trim threshold (-1: never), most mapped pieces, most arenas.
_KEEP = ((-1, -1), (-4, 0), (-8, 1))
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")


def keep_memory() -> bool:
    """Tells glibc to keep freed memory; call it before jax starts its threads. Whether it could be told.

    Nothing happens where the C library is another one, where the user has settings of their own in the environment, or
    where a GPU may be what computes. The process's memory then stays at its peak.
    """
    if (
        may_use_gpu()
        or any(name in os.environ for name in _OWN)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    ):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _KEEP)
