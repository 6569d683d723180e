"""What runs on the host: batches out of memory-mapped tokens, and weights from one file format into another."""

import atexit
import contextlib
import importlib.util
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from convert.bench.cases import Case
from convert.bench.results import OURS
from convert.bench.side import Side
from jaxlm.data.loader import LoaderSettings, make_loader, plain_batches
from jaxlm.data.shards import TokenStore

DOCUMENT = 500  # tokens, on average
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def make(case: Case, name: str) -> Side:
    """A side of the loader or of conversion."""
    if case.name.startswith("loader/"):
        return _our_batches(case) if name == OURS else _their_batches(case)
    return _our_conversion(case) if name == OURS else _their_conversion(case)


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-benchmark-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _tokens(case: Case) -> np.ndarray:
    """Random tokens in a memory-mapped file."""
    path = _folder() / "tokens.bin"
    numbers = np.random.default_rng(0).integers(0, 50_000, case.options["tokens"], dtype=np.uint16)
    numbers.tofile(path)
    return np.memmap(path, np.uint16, "r").view(np.ndarray)


def _first(inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """What a batch holds, in a few numbers."""
    return [float(x) for x in (*inputs[-1, :8], *targets[-1, -8:], inputs.astype(np.int64).sum())]


def _our_batches(case: Case) -> Side:
    o, tokens = case.options, _tokens(case)
    starts = np.unique(
        np.append(np.random.default_rng(1).integers(0, len(tokens), len(tokens) // DOCUMENT), 0)
    )
    meta = {"dtype": "uint16", "shards": [{"sha256": "0"}], "tokenizer": "t"}
    store = TokenStore([tokens], meta, starts)

    def batches(shuffle: bool) -> Iterator[dict[str, np.ndarray]]:
        settings = LoaderSettings(o["length"], o["rows"], seed=0, shuffle=shuffle, packing=o["packing"])
        fetching = importlib.util.find_spec("grain") is not None
        return iter(make_loader([store], settings)) if fetching else plain_batches([store], settings)

    ready = batches(shuffle=True)

    def run(n: int) -> None:
        for _ in range(n * o["batches"]):
            next(ready)

    def trace() -> list[float]:
        batch = next(batches(shuffle=False))
        return [] if o["packing"] else _first(batch["inputs"], batch["targets"])

    return Side(run, trace)


class _Windows(torch.utils.data.Dataset):
    """Windows of T + 1 tokens, whole batches at once, as torch's loader asks for them."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        T = self.length
        return torch.from_numpy(
            np.stack([self.tokens[i * T : (i + 1) * T + 1] for i in indices]).astype(np.int32)
        )


def _their_batches(case: Case) -> Side:
    o, windows = case.options, _Windows(_tokens(case), case.options["length"])

    def batches(shuffle: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            for rows in torch.utils.data.DataLoader(
                windows, o["rows"], shuffle, generator=generator, drop_last=True, collate_fn=lambda rows: rows
            ):
                yield rows[:, :-1], rows[:, 1:]

    ready = batches(shuffle=True)

    def run(n: int) -> None:
        for _ in range(n * o["batches"]):
            next(ready)

    def trace() -> list[float]:
        inputs, targets = next(batches(shuffle=False))
        return _first(inputs.numpy(), targets.numpy())

    return Side(run, trace)


def _write_ours(case: Case, folder: Path) -> None:
    """A model directory of noise."""
    from jaxlm.config import save
    from jaxlm.model import abstract_model
    from jaxlm.model_dir import write_manifest, write_shards
    from jaxlm.tensor_file import Planned, boxes

    assert case.run is not None
    config = case.run.model
    noise = np.random.default_rng(0).standard_normal(1 << 26, np.float32).astype(BFLOAT16)

    def planned(shape: tuple[int, ...]) -> Planned:
        sizes = [[s.stop - s.start for s in box] for box in boxes(shape, BFLOAT16)]
        return Planned(shape, BFLOAT16, lambda: (noise[: math.prod(size)].reshape(size) for size in sizes))

    folder.mkdir()
    plans = {path: planned(tuple(x.shape)) for path, x in abstract_model(config).shapes.items()}
    stored = write_shards(folder, plans, "jaxlm")
    save(config, folder / "config.json")
    write_manifest(folder, "jaxlm", stored)


def _command(*words: str) -> None:
    """A command of `python -m convert`, quietly."""
    from convert.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if main(list(words)):
            raise RuntimeError(f"python -m convert {words[0]} failed")


def _our_conversion(case: Case) -> Side:
    folder = _folder()
    ours, theirs, result = folder / "ours", folder / "theirs", folder / "result"
    _write_ours(case, ours)
    exporting = case.options["what"] == "export-hf"
    if not exporting:
        _command("export", str(ours), "--to", "hf", str(theirs), "--no-tokenizer")

    def convert() -> None:
        shutil.rmtree(result, ignore_errors=True)
        if exporting:
            _command("export", str(ours), "--to", "hf", str(result), "--no-tokenizer")
        else:
            _command("import", str(theirs), str(result))

    return _conversion(convert, result, case)


def _their_conversion(case: Case) -> Side:
    """What one writes by hand: everything into memory, transposed, and out again."""
    folder = _folder()
    ours, theirs, result = folder / "ours", folder / "theirs", folder / "result"
    _write_ours(case, ours)
    source = ours
    if case.options["what"] == "import-hf":
        _command("export", str(ours), "--to", "hf", str(theirs), "--no-tokenizer")
        source = theirs

    def convert() -> None:
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        for part in sorted(source.glob("*.safetensors")):
            tensors = load_file(part)
            turned = {
                k: v.T.contiguous() if v.ndim == 2 and "embed" not in k else v for k, v in tensors.items()
            }
            save_file(turned, result / part.name)
            with open(result / part.name, "rb") as file:
                os.fsync(file.fileno())

    return _conversion(convert, result, case)


def _conversion(convert: Callable[[], None], result: Path, case: Case) -> Side:
    def run(n: int) -> None:
        for _ in range(n):
            convert()

    def trace() -> list[float]:
        tensors: dict[str, Any] = {}
        for part in result.glob("*.safetensors"):
            tensors |= load_file(part)
        down = [v for k, v in sorted(tensors.items()) if k.endswith("down_proj.weight")]
        return [float(x) for x in (len(tensors), *down[0].shape, *down[0].flatten()[:8])]

    return Side(run, trace)
