"""Model directories, what people pass around: config.json, model-*.safetensors, a tokenizer, and a manifest of hashes.

    with staged(Path("exported")) as directory:      # a hidden directory beside it
        shards = write_shards(directory, tensors, "jaxlm")
        write_manifest(directory, "jaxlm", shards)   # flushed and renamed into place when the block ends well

The manifest holds a SHA-256 for every tensor, for what else is in its file, for every other file, and for itself;
`verify` computes them again and names what has changed.
"""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from jaxlm.config import InputError
from jaxlm.disk import sync
from jaxlm.json_file import read_object
from jaxlm.tensor_file import NAMES, Lazy, Planned, TensorFileError, open_file, write_file

MANIFEST, CONFIG = "manifest.json", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCHEMA = 1
_CHUNK = 16 << 20  # bytes read at once
_PARTIAL, _OLD = ".partial-", ".old-"  # hidden names: .NAME.partial-PID
_HERE = -100  # AT_FDCWD: a path is relative to the working directory
# Files that a reader of models would open; anything else may be added to a directory.
_READ = {".safetensors", ".json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data", ".model", ".jinja", ".py"}
Progress = Callable[[int], None]  # is told how many bytes more are done


class ModelDirError(InputError):
    """A model directory that cannot be read or written; one line per fault."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and the hash of its bytes."""

    file: str  # relative to the directory
    dtype: str  # as safetensors spells it; other formats, their own name
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int
    sha256: str


@contextlib.contextmanager
def staged(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `destination`, renamed to it when the block ends without an error, else removed.

    Everything is flushed to the disk before the rename: a directory under its final name is whole. `overwrite` puts it
    in the place of an old one, which is kept until the new one stands.

    Raises:
        ModelDirError: something is there already and `overwrite` is off, or the place cannot be written to.
    """
    destination = Path(destination).absolute()
    if os.path.lexists(destination) and not overwrite:
        empty = destination.is_dir() and not any(destination.iterdir())
        if not empty:
            raise ModelDirError(f"{destination} is there already; choose another name, or pass --overwrite")
    staging = destination.with_name(f".{destination.name}{_PARTIAL}{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(destination, _PARTIAL)
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise ModelDirError(f"{error.filename or destination}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, however it ends
        yield staging
        flush(staging)
        _put_in_place(staging, destination, overwrite)
    finally:
        _remove(staging)
        os.close(lock)


def _remove_stale(destination: Path, kind: str) -> None:
    """Removes what a killed process left beside this name; what nobody holds a lock on is nobody's."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}{kind}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    """Removes a directory, a file, or a link without what it leads to; what is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(staging: Path, destination: Path, overwrite: bool) -> None:
    """Renames `staging`; an old directory changes places with it in one step where the system can do that.

    Where it cannot, the old one is out of the way for a moment, as `.NAME.old-PID`.
    """
    if not overwrite or not os.path.lexists(destination):
        try:
            os.rename(staging, destination)  # takes the place of nothing but an empty directory
        except OSError as error:
            raise ModelDirError(
                f"{destination}: {error.strerror}; it was made while this was written"
            ) from None
    elif not _exchange(staging, destination):
        old = destination.with_name(f".{destination.name}{_OLD}{os.getpid()}")
        os.rename(destination, old)
        try:
            os.rename(staging, destination)
        except OSError:
            os.rename(old, destination)
            raise
        os.rename(old, staging)  # where it is removed
    sync(destination.parent)
    _remove_stale(destination, _OLD)


def _exchange(one: Path, other: Path) -> bool:
    """Two names change places at once (Linux' renameat2 with RENAME_EXCHANGE); False where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), 2) == 0


def flush(directory: Path) -> None:
    """Brings every file and directory below to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def plan_shards(tensors: Mapping[str, Planned], max_bytes: int) -> dict[str, dict[str, Planned]]:
    """Tensors by file, in their order, each file at most `max_bytes` (a larger tensor has one of its own)."""
    groups: list[dict[str, Planned]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def write_shards(
    directory: Path,
    tensors: Mapping[str, Planned],
    format: str,
    max_bytes: int = 5_000_000_000,
    progress: Progress = lambda n: None,
) -> dict[str, Stored]:
    """Writes tensors as model.safetensors, or as shards with an index; `format` stands in each file's metadata."""
    shards = plan_shards(tensors, max_bytes)
    stored: dict[str, Stored] = {}
    for file, group in shards.items():
        stored |= write_tensors(directory, file, group, format, progress)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: s.file for n, s in stored.items()}}
        write_json(directory / INDEX, index)
    return stored


def write_tensors(
    directory: Path,
    file: str,
    tensors: Mapping[str, Planned],
    format: str,
    progress: Progress = lambda n: None,
) -> dict[str, Stored]:
    """Writes one safetensors file of a directory."""
    start, digests = write_file(directory / file, tensors, {"format": format}, progress)
    stored, offset = {}, start
    for name, tensor in tensors.items():
        stored[name] = Stored(file, NAMES[tensor.dtype], tensor.shape, offset, tensor.nbytes, digests[name])
        offset += tensor.nbytes
    return stored


def weight_map(directory: Path) -> dict[str, str]:
    """The file of each tensor, as the index says. Raises TensorFileError where the index is damaged."""
    path = directory / INDEX
    try:
        files = read_object(path).get("weight_map")
    except OSError as error:
        raise TensorFileError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise TensorFileError(f"{path}: {error}") from None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise TensorFileError(f"{path}: weight_map must be an object of tensor names and file names")
    return files


def open_weights(directory: Path) -> dict[str, Lazy]:
    """Every tensor of model.safetensors, or else of the shards that the index names. Raises TensorFileError."""
    single = directory / WEIGHTS
    return (
        open_file(single) if single.is_file() or not (directory / INDEX).is_file() else open_shards(directory)
    )


def open_shards(directory: Path) -> dict[str, Lazy]:
    """Every tensor of the shards that the index names, unread.

    Raises TensorFileError with everything that is wrong, a line each: a shard that is missing, damaged or outside the
    directory, a tensor that is not where the index says, or is in two shards.
    """
    files = weight_map(directory)
    problems: list[str] = []
    shards: dict[str, dict[str, Lazy]] = {}
    for file in sorted(set(files.values())):
        if not _plain(file):
            problems.append(f"{INDEX}: {file!r} is not the name of a file in this directory")
            continue
        try:
            shards[file] = open_file(directory / file)
        except TensorFileError as error:
            problems.append(str(error))
    tensors: dict[str, Lazy] = {}
    for name, file in files.items():
        if file in shards and name not in shards[file]:
            problems.append(f"{name}: {INDEX} says it is in {file}, which does not hold it")
        elif file in shards:
            tensors[name] = shards[file][name]
    for file, shard in shards.items():
        for name in shard:
            if name not in files:
                problems.append(f"{name}: is in {file}, but {INDEX} does not name it")
            elif files[name] != file:
                problems.append(f"{name}: is in {file} too, {INDEX} says {files[name]}")
    if problems:
        raise TensorFileError("\n".join(problems))
    return tensors


def _plain(name: str) -> bool:
    usual = name not in ("", ".", "..") and name.isprintable() and len(name) < 256
    return usual and PurePath(name).name == name and PureWindowsPath(name).name == name


def write_json(path: Path, value: Any) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(
    directory: Path, format: str, tensors: Mapping[str, Stored], facts: Mapping[str, Any] | None = None
) -> None:
    """Writes manifest.json over everything in the directory; call it last. `facts`: more that should be remembered."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        within = [(s.offset, s.nbytes) for s in tensors.values() if s.file == name]
        files[name] = {"bytes": path.stat().st_size, "sha256": _hash_around(path, within)}
    body = {
        "schema": SCHEMA,
        "format": format,
        "created_by": f"jaxlm {_version()}",
        **(facts or {}),
        "files": files,
        "tensors": {name: asdict(stored) for name, stored in tensors.items()},
    }
    write_json(directory / MANIFEST, body | {"sha256": _digest_of(body)})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, None where there is none. Raises ModelDirError on one that was changed, or of another schema."""
    path = Path(directory) / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelDirError(f"{path}: cannot be read ({type(error).__name__})") from None
    if _digest_of(body) != digest:
        raise ModelDirError(f"{path}: has changed since it was written (its own SHA-256 differs)")
    if body.get("schema") != SCHEMA:
        raise ModelDirError(f"{path}: has schema {body.get('schema')}; this version reads {SCHEMA}")
    if not _well_formed(body):
        raise ModelDirError(f"{path}: its files and tensors are not described as this version does")
    return body


def _well_formed(body: dict[str, Any]) -> bool:
    """Whether the facts are there, in the types expected, and about files of this directory only."""

    def inside(name: str) -> bool:
        path = PurePosixPath(name)
        return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name

    def counts(*values: Any) -> bool:
        return all(type(value) is int and 0 <= value < 2**62 for value in values)

    try:
        files = all(inside(n) and counts(f["bytes"]) and "sha256" in f for n, f in body["files"].items())
        return files and all(
            t["file"] in body["files"] and counts(t["offset"], t["nbytes"]) and "sha256" in t
            for t in body["tensors"].values()
        )
    except (KeyError, TypeError, AttributeError):
        return False


def verify(directory: Path, progress: Progress = lambda n: None) -> tuple[list[str], int]:
    """Every difference from the manifest, a line each, and the number of tensors that were hashed.

    Raises ModelDirError where there is no manifest, or a damaged one.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ModelDirError(f"{directory}: has no {MANIFEST}, so there is nothing to verify against")
    problems = []
    for name, facts in manifest["files"].items():
        path = directory / name
        tensors = {n: t for n, t in manifest["tensors"].items() if t["file"] == name}
        if not path.is_file():
            problems.append(
                f"{name}: missing" + (f", and its {len(tensors)} tensors with it" if tensors else "")
            )
            continue
        if (size := path.stat().st_size) != facts["bytes"]:
            problems.append(f"{name}: has {size} bytes instead of {facts['bytes']}")
        problems += [
            f"{tensor}: its bytes in {name} have changed (SHA-256 differs)"
            for tensor, t in tensors.items()
            if _hash_range(path, t["offset"], t["nbytes"], progress) != t["sha256"]
        ]
        within = [(t["offset"], t["nbytes"]) for t in tensors.values()]
        if size == facts["bytes"] and _hash_around(path, within) != facts["sha256"]:
            what = "its header has changed" if tensors else "has changed"
            problems.append(f"{name}: {what} (SHA-256 differs)")
    known = {MANIFEST, *manifest["files"]}
    found = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    problems += [
        f"{name}: is not in {MANIFEST}, and readers may open it; remove it"
        for name in found
        if name not in known and Path(name).suffix in _READ
    ]
    return problems, len(manifest["tensors"])


def _hash_range(path: Path, offset: int, nbytes: int, progress: Progress = lambda n: None) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(offset)
        while nbytes > 0 and (piece := file.read(min(_CHUNK, nbytes))):
            total.update(piece)
            progress(len(piece))
            nbytes -= len(piece)
    return total.hexdigest()


def _hash_around(path: Path, within: list[tuple[int, int]]) -> str:
    """SHA-256 of a file without the given ranges (offset, bytes)."""
    total, end = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for offset, nbytes in [*sorted(within), (end, 0)]:
            while (left := offset - file.tell()) > 0 and (piece := file.read(min(_CHUNK, left))):
                total.update(piece)
            file.seek(max(offset, file.tell()) + nbytes)
    return total.hexdigest()


def _digest_of(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("jaxlm")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
