"""Whether files of tokenised data are still what was written: at once, by a sample, or in the background.

    full    every byte of every file, now
    quick   size, and one block at a place that the file's own hash decides; a file whose time differs from the one
            at which it was last known to be whole is read in full. The rest of a file is read in the background when
            it is first used.

times.json beside the files says when each was known to be whole. It belongs to this copy on this disk, so it is no
part of what identifies the data, and may be missing.
"""

import contextlib
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from jaxlm.data.blocks import DataError

SAMPLE_BYTES = 1 << 16
TIMES = "times.json"
_CHUNK = 1 << 22  # bytes hashed at once
Verify = Literal["quick", "full"]
Entry = dict[str, Any]  # file, bytes, sha256, sample {offset, bytes, sha256}


class ShardError(DataError):
    """Tokenised data that is damaged or belongs to something else; the message names file and place."""


def describe(path: Path) -> Entry:
    """What identifies a file's contents: its name, size, SHA-256, and a sampled block with its own."""
    size, digest = path.stat().st_size, file_hash(path)
    length = min(size, SAMPLE_BYTES)
    offset = int(digest[:16], 16) % (size - length + 1)
    sample = {"offset": offset, "bytes": length, "sha256": _sample_hash(path, offset, length)}
    return {"file": path.name, "bytes": size, "sha256": digest, "sample": sample}


def file_hash(path: Path) -> str:
    """SHA-256 of a file; the interpreter's lock is free meanwhile."""
    with open(path, "rb", buffering=0) as file:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return digest.hexdigest()


def check_files(directory: Path, entries: Sequence[Entry], verify: Verify, remedy: str) -> set[str]:
    """Compares files with their entries and returns the names of those that were read in full.

    Args:
        remedy: what to do about a damaged file, for messages.

    Raises:
        ShardError: a file is missing, of another size, or damaged.
    """
    times = _read_times(directory)
    now = {entry["file"]: _check_size(directory / entry["file"], entry, remedy) for entry in entries}
    names = {name for name, time in now.items() if verify == "full" or times.get(name) != time}
    for entry in entries:
        path, sample = directory / entry["file"], entry["sample"]
        if path.name in names:
            continue
        if _readable(path, _sample_hash, path, sample["offset"], sample["bytes"]) != sample["sha256"]:
            raise _damaged(path, remedy)
    whole = [entry for entry in entries if entry["file"] in names]
    if whole:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda entry: check_whole(directory / entry["file"], entry, remedy), whole))
    if any(times.get(name) != now[name] for name in names):
        write_times(directory, times | {name: now[name] for name in names})
    return names


def check_whole(path: Path, entry: Entry, remedy: str) -> None:
    """Reads every byte of a file. Raises ShardError if they are not those that were written."""
    _check_size(path, entry, remedy)
    if _readable(path, file_hash, path) != entry["sha256"]:
        raise _damaged(path, remedy)


def write_times(directory: Path, times: dict[str, int]) -> None:
    """Notes when files were last known to be whole, in ns; where that cannot be written they are read again instead."""
    partial = directory / f".{TIMES}.{os.getpid()}"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(directory / TIMES)
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)


def _read_times(directory: Path) -> dict[str, int]:
    try:
        times = json.loads((directory / TIMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return times if isinstance(times, dict) else {}


def _check_size(path: Path, entry: Entry, remedy: str) -> int:
    """Time of the last change in ns, if the size is right."""
    stat = _readable(path, path.stat)
    if stat.st_size != entry["bytes"]:
        fault = "truncated" if stat.st_size < entry["bytes"] else "too long"
        raise ShardError(f"{path} is {fault}: {stat.st_size} bytes instead of {entry['bytes']}; {remedy}")
    return stat.st_mtime_ns


def _readable(path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; restore it or tokenise anew") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from None


def _damaged(path: Path, remedy: str) -> ShardError:
    return ShardError(f"{path} is damaged or was changed: its checksum is not that of meta.json; {remedy}")


def _sample_hash(path: Path, offset: int, length: int) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.sha256(os.pread(file.fileno(), length, offset)).hexdigest()


class Watch:
    """Reads the files of a split in full, each once, when they are first used; one thread for all splits.

    Args:
        directory: of the files.
        entries: of the files, by their number.
        done: names of files that need not be read any more.
        remedy: what to do about a damaged file, for messages.
    """

    def __init__(self, directory: Path, entries: Sequence[Entry], done: Iterable[str], remedy: str) -> None:
        self._directory, self._entries, self._remedy = directory, entries, remedy
        known = set(done)
        self._waiting = [entry["file"] not in known for entry in entries]
        self.quiet = not any(self._waiting)  # no file is left to ask for
        self._fault: ShardError | None = None
        self.pending = 0  # files asked for and not read yet

    def use(self, numbers: Iterable[int]) -> None:
        """Asks for files by number. Raises ShardError if one asked for before is damaged."""
        self.complain()
        for number in numbers:
            if self._waiting[number]:
                self._waiting[number] = False
                self.pending += 1
                _reader().put((self, number))
        self.quiet = not any(self._waiting)

    def complain(self) -> None:
        """Raises ShardError if a file was found damaged."""
        if self._fault is not None:
            raise ShardError(str(self._fault))

    def read(self, number: int) -> None:
        """Called by the thread."""
        entry = self._entries[number]
        try:
            check_whole(self._directory / entry["file"], entry, self._remedy)
        except ShardError as error:
            self._fault = error
        self.pending -= 1


_lock = threading.Lock()
_asked: "queue.SimpleQueue[tuple[Watch, int]] | None" = None


def _reader() -> "queue.SimpleQueue[tuple[Watch, int]]":
    """What the background thread takes its work from; it is started when there is some."""
    global _asked
    with _lock:
        if _asked is None:
            _asked = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(_asked,), name="data-check", daemon=True).start()
        return _asked


def _serve(asked: "queue.SimpleQueue[tuple[Watch, int]]") -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    while True:
        watch, number = asked.get()
        watch.read(number)
