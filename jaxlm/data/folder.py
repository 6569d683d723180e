"""The folder of a preparation: whose it is, whether it already holds what is wanted, and how it gets its name."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxlm.cli import say
from jaxlm.data.blocks import DataError
from jaxlm.data.shards import ShardError, read_meta
from jaxlm.data.verify import check_files
from jaxlm.disk import is_full, sync
from jaxlm.tokenizer import template_file

SPLITS = ("train", "val")
TOKENIZER, DATASET, PROGRESS = "tokenizer.json", "dataset.json", "progress.json"
_OWN = {*SPLITS, TOKENIZER, template_file(TOKENIZER).name, DATASET, PROGRESS}


def tail(tokens: int, val_fraction: float, least: int, source: str) -> int:
    """Tokens held out of a source of few documents: its last share, at least `least`. Raises DataError if too short."""
    held_out = max(math.floor(tokens * val_fraction), least)
    if tokens - held_out < least:
        raise DataError(
            f"{source} is too short: {tokens} tokens, but training and validation need one window each, "
            f"{2 * least} tokens (windows of {least}, seq_len + 1)"
        )
    return held_out


def check_folder(out_dir: Path) -> None:
    """Raises DataError where the folder holds anything that is not tokenised data."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise DataError(f"{out_dir} is a file; tokenised data needs a folder")
    names = sorted(p.name for p in out_dir.iterdir())
    # A tokenizer alone is somebody's own, however much it is called like a part of a preparation.
    others = [n for n in names if n not in _OWN] if {*SPLITS, DATASET, PROGRESS} & set(names) else names
    if others:
        raise DataError(f"{out_dir} holds {others[0]!r}, which is no tokenised data; choose another folder")


def holds(folder: Path, recipe: dict[str, Any], min_tokens: int) -> bool:
    """Whether a folder already is what the recipe gives."""
    if not (folder / DATASET).is_file() or not (folder / TOKENIZER).is_file():
        return False
    try:
        metas = [read_meta(folder / split) for split in SPLITS]
        for meta, split in zip(metas, SPLITS):
            check_files(folder / split, [*meta["shards"], meta["index"]], "quick", "")
    except ShardError:
        return False
    if not all(meta.get(key) == value for meta in metas for key, value in recipe.items() if key != "source"):
        return False
    train, val = (meta["tokens"] for meta in metas)
    if metas[0]["split_by"] == "tokens":
        return bool(val == tail(train + val, recipe["val_fraction"], min_tokens, recipe["source"]))
    return bool(min(train, val) >= min_tokens)


def refuse(folder: Path, recipe: dict[str, Any], facts: Path) -> None:
    """Raises DataError that says in what the data in a folder differs from what is wanted."""
    try:
        found = json.loads(facts.read_text(encoding="utf-8"))
        found = found.get("recipe", found)
        different = [key for key, value in recipe.items() if found.get(key) != value and key != "source"]
    except (OSError, ValueError, AttributeError):
        found, different = {}, []
    told = {
        "source_fingerprint": f"the source is another or has changed since ({found.get('source')})",
        "tokenizer": "the tokenizer is another",
        "template": "the chat template is another",
    }
    reasons = [told.get(key, f"{key} was {found.get(key)!r}, is {recipe[key]!r}") for key in different]
    what = "; ".join(reasons) or "it is damaged or unfinished"
    raise DataError(
        f"{folder} holds tokenised data that cannot be used here: {what}; delete it or choose another --out"
    )


def publish(partial: Path, out_dir: Path) -> None:
    """Moves `partial` to `out_dir`, replacing older data there."""
    old = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    sync(out_dir.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """One preparation at a time per folder, so that whatever is unfinished there was left by a dead process."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which is writing {partial}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # network file systems refuse locks on directories
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), partial.stat()):
                break
        os.close(handle)  # whoever had it has finished and moved it away
    try:
        yield
    finally:
        if partial.is_dir() and not (partial / PROGRESS).exists() and not (partial / DATASET).exists():
            shutil.rmtree(partial, ignore_errors=True)  # nothing in it is worth keeping
        os.close(handle)


def disk_error(error: OSError, out_dir: Path, partial: Path, temporary: bool) -> ShardError:
    """What to raise when writing failed; `temporary` as in `write_dataset`."""
    reason = error.strerror or str(error)
    if not is_full(error):
        return ShardError(f"tokenised data cannot be written to {out_dir}: {reason}")
    if temporary:
        return ShardError(
            f"no space for the tokenised data in {out_dir.parent} ({reason}); nothing was left there: "
            "free some space or set data.cache to a folder on another disk"
        )
    kept = f"what is done is kept in {partial}" if (partial / PROGRESS).exists() else "nothing was left there"
    return ShardError(
        f"no space for the tokenised data in {out_dir.parent} ({reason}); {kept}: "
        "free some space and give the same command again"
    )
