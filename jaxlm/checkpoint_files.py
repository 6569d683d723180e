"""A directory that is whole or known to be damaged: a manifest over every file in it, and over itself.

The manifest is one line, `{"sha256": DIGEST, "body": BODY}`: DIGEST is that of BODY's bytes as they stand there, and
what surrounds both is compared byte for byte, so that no bit of the file can change unnoticed. BODY's `files` has size
and SHA-256 of everything else below the directory; a file more or less is damage as well. No framework here.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm.config import InputError
from jaxlm.disk import free_bytes, sync

THREADS = min(16, os.cpu_count() or 1)  # that hash; hashlib lets go of the interpreter meanwhile
_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "body": ', b"}\n"
_DIGITS = 64  # of a SHA-256 in hexadecimal


class DamagedError(InputError):
    """A directory whose manifest does not describe it any more; the message names the file and what is wrong."""


class DiskFullError(InputError):
    """Something was not written for want of space; what was there before is as it was."""


def seal(root: Path, name: str, facts: dict[str, Any]) -> None:
    """Writes the manifest `name` of a finished directory, and returns when all of it has reached the disk.

    facts: JSON kept beside the checksums. Call it last: a file that is written later counts as damage.
    """
    found = list(_files(root))
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(_flushed_sum, found))
    files = {path.relative_to(root).as_posix(): value for path, value in zip(found, sums, strict=True)}
    body = json.dumps(facts | {"files": files}, sort_keys=True).encode()
    with open(root / name, "wb") as file:
        file.write(_HEAD + _digest(body) + _MIDDLE + body + _TAIL)
        file.flush()
        os.fsync(file.fileno())
    for folder in {path.parent for path in found} | {root}:
        sync(folder)


def read_manifest(root: Path, name: str) -> dict[str, Any]:
    """What `seal` was given, with `files`. Raises DamagedError on a manifest that is not as `seal` wrote it."""
    path = root / name
    raw = _bytes_of(path)
    start = len(_HEAD) + _DIGITS + len(_MIDDLE)
    head, body, tail = raw[:start], raw[start : -len(_TAIL)], raw[-len(_TAIL) :]
    if head != _HEAD + _digest(body) + _MIDDLE or tail != _TAIL:
        raise DamagedError(f"{path} has changed since it was written (SHA-256 differs)")
    return json.loads(body)


def check(root: Path, name: str, hashes: bool = True) -> dict[str, Any]:
    """The manifest, after every file of the directory was compared with it.

    hashes: False compares names and sizes only, which takes no time. Raises DamagedError that names a file.
    """
    manifest = read_manifest(root, name)
    check_files(root, manifest["files"], hashes)
    found = {path.relative_to(root).as_posix() for path in _files(root)}
    if extra := sorted(found - manifest["files"].keys() - {name}):
        raise DamagedError(f"{root / extra[0]} is no part of it")
    return manifest


def check_files(root: Path, files: dict[str, list[Any]], hashes: bool = True) -> None:
    """Compares files with {name: [bytes, SHA-256]}. Raises DamagedError that names the first difference."""
    for name, (size, _) in files.items():
        path = root / name
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (here := path.stat().st_size) != size:
            raise DamagedError(f"{path} has {here} bytes instead of {size}")
    if hashes:
        with ThreadPoolExecutor(THREADS) as pool:
            sums = pool.map(_sha256, [root / name for name in files])
            for (name, (_, digest)), here in zip(files.items(), sums, strict=True):
                if here != digest:
                    raise DamagedError(f"{root / name} has changed since it was written (SHA-256 differs)")


def preflight(directory: Path, one: int, keep: int, count: int, say: Callable[[str], None]) -> None:
    """Asks before a run whether its checkpoints will fit: `keep` newest, the best, and one being written.

    one: bytes of a checkpoint; count: how many are there already. A tight disk is said in one line. Raises
    DiskFullError where not even one more would fit.
    """
    free = free_bytes(directory)
    sizes = f"one needs {one / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
    if free < one:
        raise DiskFullError(
            f"no room for a checkpoint in {directory}: {sizes}; free some or choose another --run-dir"
        )
    wanted = max(1, keep + 2 - count)
    if free < wanted * one:
        say(
            f"warning: {directory} has room for {free // one} more checkpoints but may hold {wanted} more: {sizes}; "
            "free some or lower --train.keep"
        )


def _files(root: Path) -> Iterable[Path]:
    """Everything below a directory that is not a directory, in order."""
    return sorted(path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


def _flushed_sum(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return [file.tell(), digest]


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
