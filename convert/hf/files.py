"""Hugging Face's safetensors files: one file, or shards with an index. Nothing is read before it is needed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf.families import INERT_TENSORS
from convert.rules import ConversionError, Pair, problems_of
from jaxlm.config import ModelConfig
from jaxlm.json_file import read_object
from jaxlm.model_dir import INDEX, WEIGHTS, open_weights
from jaxlm.tensor_file import Lazy, Planned, TensorFileError, blocks

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ConversionError in one line, for a key that stands twice too."""
    try:
        return read_object(path)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None


def open_checkpoint(directory: Path) -> dict[str, Lazy]:
    """Every tensor of model.safetensors, or of the shards that its index names, unread.

    Raises:
        ConversionError: everything that is wrong, a line each: no safetensors file, a shard that is missing, damaged
            or outside the directory, a tensor that is not where the index says, or is in two shards.
    """
    directory = Path(directory)
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        try:
            return open_weights(directory)
        except TensorFileError as error:
            raise ConversionError(str(error)) from None
    if not directory.is_dir():
        raise ConversionError(f"{directory}: no such directory")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{directory}: {pickles[0]} is a pickle, which can run code when it is opened and is not read; save the "
            "model as safetensors: model.save_pretrained(DIR, safe_serialization=True)"
        )
    raise ConversionError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}")


def usable(
    config: ModelConfig, pairs: list[Pair], tensors: Mapping[str, Lazy], vocab_size_from: str = "config.json"
) -> dict[str, Lazy]:
    """The tensors that a table takes: without old buffers, and without a stored head that is the embedding again.

    Raises:
        ConversionError: everything that is wrong, a line each: missing, misshapen and unknown tensors, rows that the
            vocabulary does not have, a tied head that differs, numbers that are no weights.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not INERT_TENSORS.fullmatch(name)}
    problems = [
        f"{name}: holds {tensor.dtype}, which is no floating-point weight"
        for name, tensor in kept.items()
        if tensor.dtype.kind in "iub"
    ]
    padded = [
        f"{name}: has {kept[name].shape[0]} rows, {vocab_size_from} says vocab_size={config.vocab_size}"
        for name in (_EMBEDDING, _HEAD)
        if name in kept and len(kept[name].shape) == 2 and kept[name].shape[0] != config.vocab_size
    ]
    problems += padded
    if config.tied and _HEAD in kept:
        head = kept.pop(_HEAD)
        if not padded and _EMBEDDING in kept and not _same_bits(head, kept[_EMBEDDING]):
            problems.append(
                f"{_HEAD}: differs from {_EMBEDDING}, though config.json says tie_word_embeddings=true"
            )
    told = {line.partition(":")[0] for line in padded}
    problems += [p for p in problems_of(pairs, kept, inverse=True) if p.partition(" ")[0] not in told]
    if problems:
        raise ConversionError("\n".join(problems))
    return kept


def _same_bits(one: Lazy, other: Lazy) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pieces = zip(blocks(one.read()), blocks(other.read()), strict=True)
    return all(np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)) for a, b in pieces)


def common_dtype(tensors: Iterable[Planned]) -> np.dtype:
    """The dtype that most bytes are in."""
    sizes: dict[np.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
