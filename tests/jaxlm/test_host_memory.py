"""Training keeps the host's memory between steps: what that saves, and whose settings stand."""

import os
import subprocess
import sys

import pytest

from jaxlm import host_memory

# Takes 64 MB, touches every page and frees them, twice; the page faults of the second time.
PROGRAM = """
import ctypes, resource, sys
from jaxlm.host_memory import keep_memory
print(keep_memory() if sys.argv[1] == "keep" else None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    piece = libc.malloc(64 << 20)
    ctypes.memset(piece, 1, 64 << 20)
    libc.free(piece)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> tuple[str, int]:
    """What keep_memory said, and the page faults of touching memory that was freed before."""
    command = [sys.executable, "-c", PROGRAM, word]
    clean = {name: value for name, value in os.environ.items() if name not in host_memory._OWN}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    """64 MB are 16,384 pages, which without it the system fills with zeros at every step."""
    said, kept = faults("keep")
    if said == "False":
        pytest.skip("the C library is none that can be told")
    assert kept < 500 < 10_000 < faults("leave")[1]


@pytest.mark.parametrize("name", [*host_memory._OWN, "GLIBC_TUNABLES"])
def test_the_users_settings_of_the_heap_stand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets one of them has a reason."""
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: pytest.fail("glibc was told"))
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=1" if name == "GLIBC_TUNABLES" else "1")
    assert host_memory.keep_memory() is False
