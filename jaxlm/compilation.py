"""What jax is told before it starts: where compiled programs are kept, and settings for GPUs. No jax here.

Compiled programs are kept between processes, by default in $XDG_CACHE_HOME/jaxlm (~/.cache/jaxlm). jax names them by
the program, its own version, the compiler's flags and the processor's features, so that versions and machines may
share a folder. Two things it leaves to whoever turns it on:

- Whoever can write to the folder can run code as its user: it must belong to the user, mode 0700, below folders that
  nobody else can exchange. One that does not is refused.
- XLA divides the loops of a CPU program among the cores it sees while it compiles, and jax's names do not say how
  many: a program made on one core stays on one (measured: 82 ms for 44 on two). Hence a folder per number of cores.

A folder that the user names (JAX_COMPILATION_CACHE_DIR) is used as jax uses it, if it is safe;
JAX_ENABLE_COMPILATION_CACHE=false turns all of this off. Whatever happens to the folder, programs are compiled instead.
"""

import grp
import importlib.util
import os
import pwd
import stat
import zlib
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

FOLDER, ENABLED = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
LIMIT = 2 << 30  # bytes of the default folder; the programs that were not used for longest make room
# Of programs to be kept: all. A start compiles a few, of which the short ones are many of the seconds.
KEEP = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_OFF = ("0", "f", "false", "n", "no", "off")  # jax's words


class Setting(NamedTuple):
    """An environment variable for processes that compute on a GPU."""

    name: str
    value: str
    reason: str


GPU = (
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.92",
        "of the device's memory for jax, which takes it at once; 0.75 by default, which leaves 35 GB of an H200 unused",
    ),
    Setting(
        "JAX_COMPILER_ENABLE_REMAT_PASS",
        "false",
        "XLA recomputes what does not fit by a poor choice of its own; --train.remat says what is recomputed",
    ),
)


def set_up(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Sets what the user has not; must run before jax is imported. Returns what the user should know, a line each."""
    if may_use_gpu(environment):
        for one in GPU:
            environment.setdefault(one.name, one.value)
    if environment.get(ENABLED, "true").lower() in _OFF:
        return []
    for name, value in KEEP.items():
        environment.setdefault(name, value)
    if FOLDER in environment:
        return _check_named(environment)
    folder = default_folder(environment)
    reason = "" if folder is None else _unsafe(folder)
    if reason:
        return [f"compiled programs are not kept: {reason}"]
    # jax's limit on the size needs the library, and on etils a user that the system has a name for.
    if folder is not None and importlib.util.find_spec("filelock") and _has_name():
        environment[FOLDER] = str(folder)
        environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LIMIT))
        mend(folder)
    return []


def default_folder(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Where compiled programs are kept unless the user says otherwise, made if need be; None where that cannot be."""
    base = environment.get("XDG_CACHE_HOME", "")
    try:
        root = (
            Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        )  # the specification wants it absolute
        if not root.is_absolute():
            return None
        folder = root / "jaxlm" / f"compiled-on-{_cores()}-cores"
        _make(folder)
        return folder.resolve() if os.access(folder, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):
        return None


def mend(folder: Path) -> None:
    """Puts in order what killed processes have left: jax writes a program, then when it was used.

    A program without the second file is given one if it is whole and removed if not; jax would trip over it.
    """
    import filelock

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=0):  # held by jax while it reads or writes
            programs = {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}
            used = {path.name.removesuffix("-atime") for path in folder.glob("*-atime")}
            for name in programs - used:
                if _is_whole(folder / f"{name}-cache"):
                    (folder / f"{name}-atime").write_bytes(bytes(8))
                else:
                    (folder / f"{name}-cache").unlink()
            for name in used - programs:
                (folder / f"{name}-atime").unlink()
    except (OSError, filelock.Timeout):
        return  # someone is at work in it, or it cannot be written to: the next process will


def _check_named(environment: MutableMapping[str, str]) -> list[str]:
    """Turns the cache off where the user's folder is not safe."""
    named = environment[FOLDER]
    if not named or "://" in named:  # none, or a store that has permissions of its own
        return []
    folder = Path(named).absolute()
    try:
        _make(folder)
        usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
        reason = _unsafe(folder.resolve()) if usable else f"{folder} is no folder that can be written to"
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
    if reason:
        environment[ENABLED] = "false"
        return [f"compiled programs are not kept: {reason}"]
    environment[FOLDER] = str(folder.resolve())
    return []


def _make(folder: Path) -> None:
    """A folder and those above it that are missing, for the user alone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _unsafe(folder: Path) -> str:
    """Why someone else could put programs into a folder, which is resolved; '' where nobody can."""
    own = os.stat(folder)
    if own.st_uid != os.geteuid():
        return (
            f"{folder} belongs to another user, who could run code as you; remove it or name one in {FOLDER}"
        )
    if own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {folder} and so run code as you; chmod 700 {folder}"
    for path in folder.parents:
        above = os.stat(path)
        others = stat.S_IWOTH if _is_private(above.st_gid) else stat.S_IWGRP | stat.S_IWOTH
        writable = above.st_mode & others and not above.st_mode & stat.S_ISVTX
        if writable or above.st_uid not in (0, os.geteuid()):
            return f"others may exchange {folder} by way of {path} and so run code as you; name another in {FOLDER}"
    return ""


def _is_whole(program: Path) -> bool:
    """Whether all of a program is there; what jax compressed with something else than zlib counts as damaged."""
    try:
        zlib.decompress(program.read_bytes())
    except zlib.error:
        return False
    return True


def _cores() -> int:
    """Cores that this process may use, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_private(group: int) -> bool:
    """Whether a group is the user's alone, as most systems make one for each user; it may write to what is theirs."""
    try:
        found, name = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == name and set(found.gr_mem) <= {name}


def _has_name() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True


def may_use_gpu(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether jax would look for a GPU: its CUDA plugin is installed, and no other platform was asked for."""
    platforms = environment.get("JAX_PLATFORMS", "")
    installed = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return installed and (not platforms or "cuda" in platforms or "gpu" in platforms)
