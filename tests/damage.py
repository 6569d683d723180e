"""Ways to damage a model directory, for tests of what is refused."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts = {k: v for k, v in (facts | changes).items() if v is not None}
    path.write_text(json.dumps(facts), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites a safetensors file after `change` has worked on its tensors."""
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_header(path: Path, change: Callable[[str], str]) -> None:
    """Rewrites the header of a safetensors file as text, whatever comes of it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def split(directory: Path) -> tuple[Path, Path]:
    """Turns model.safetensors into two shards with an index."""
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    names = list(tensors)
    files = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, file, metadata={"format": "pt"})
    whole.unlink()
    index = {name: file.name for file, half in zip(files, halves, strict=True) for name in half}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files[0], files[1]


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)
