"""Memory of the devices a process computes on, and of the process itself. jax is imported only where it is asked."""

import resource
import sys


def process_peak_memory() -> int:
    """The most main memory this process has held so far, in bytes (its peak resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_memory() -> int:
    """The most memory that the fullest of this process's jax devices has held so far, in bytes.

    Where the backend keeps no such count (the CPU's), it is `process_peak_memory`.
    """
    import jax

    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=0) or process_peak_memory()
