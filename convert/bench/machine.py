"""The machine under the benchmark: what it is, how fast products and memory are at best, what a side holds."""

import ctypes
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.metrics import peak_flops
from jaxlm.plan import TARGETS

DTYPES = ("float32", "bfloat16")
CPU_SIZES = (1024, 2048)  # of the square products that stand for a CPU's peak
CPU_COPY = 1 << 28  # bytes
VERSIONS = ("jax", "torch", "numpy")


def describe(small: bool = False) -> dict[str, Any]:
    """Device, versions and peaks; on a CPU, which has no data sheet, the peaks are measured with both frameworks.

    small: on products too small to say much, for those who only try things out.
    """
    device = jax.devices()[0]
    told: dict[str, Any] = {
        "device": device_name(),
        "platform": device.platform,
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name in VERSIONS if (version := _version(name))),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.platform == "gpu":
        half = peak_flops(device.device_kind, "bfloat16")
        told |= {
            "peak_flops": {"bfloat16": half},
            "bandwidth": _bandwidth(device.device_kind),
            "peak_source": "data sheet",
        }
        return told
    sizes = (128,) if small else CPU_SIZES
    peaks = {dtype: max(_matmul_rate(dtype, n) for n in sizes) for dtype in DTYPES}
    return told | {
        "peak_flops": peaks,
        "bandwidth": _copy_rate(CPU_COPY >> 8 if small else CPU_COPY),
        "peak_source": f"measured: the faster framework's square product of {' or '.join(map(str, sizes))}, a copy",
    }


def _bandwidth(kind: str) -> float | None:
    """Bytes per second by the data sheet of a GPU whose name holds that of a target, None of another."""
    names = {name: target.bandwidth for name, target in TARGETS.items() if name.split("-")[0] in kind.lower()}
    exact = [name for name in names if "-" in name and f"{name.split('-')[1]}gb" in kind.lower()]
    return names[exact[0]] if exact else next(iter(names.values()), None)


def device_name() -> str:
    """`NVIDIA H200`, or the CPU's model and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    import os

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _best(run: Callable[[], object], tries: int = 4) -> float:
    run()
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


def _matmul_rate(dtype: str, n: int) -> float:
    """FLOP/s of [n, n] x [n, n] in the framework that does it faster."""
    import torch

    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    y = torch.ones((n, n), dtype=getattr(torch, dtype))
    seconds = min(_best(lambda: product(x, x).block_until_ready()), _best(lambda: y @ y))
    return 2 * n**3 / seconds


def _copy_rate(size: int) -> float:
    """Bytes per second that a copy of so many bytes reads and writes."""
    import torch

    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


class PeakMemory:
    """Bytes that a side brings with it at its height; None where the system does not tell.

    On a CPU the growth of the process's resident set since `PeakMemory()` was made, at its peak since `restart`; on a
    GPU what the framework of the side has allocated there at most; jax's peak there is the process's, and None is told
    of a case that did not raise it.
    """

    def __init__(self, framework: str) -> None:
        self.framework, self.gpu = framework, jax.devices()[0].platform == "gpu"
        gc.collect()
        if not self.gpu:
            _give_back()  # what a side before this one left in the heap is not this one's to reuse
        self.before = self._jax_peak() if self.gpu else _status("VmRSS")

    def restart(self) -> None:
        """Begins anew, after the first run, whose compilation is not to count."""
        if not self.gpu:
            try:
                gc.collect()
                _give_back()  # what the compiler freed
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            except OSError:
                self.before = None
        elif self.framework == "torch":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int | None:
        """What was held at most."""
        if not self.gpu:
            peak = _status("VmHWM")
            return None if self.before is None or peak is None else max(0, peak - self.before)
        if self.framework == "torch":
            import torch

            return torch.cuda.max_memory_allocated()
        peak = self._jax_peak()
        return peak if peak is not None and peak > (self.before or 0) else None

    def _jax_peak(self) -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _give_back() -> None:
    """Freed memory goes back to the system, where the C library can do that."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
