"""Hugging Face checkpoints: Llama, Mistral, Mixtral, Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE, in and out.

`read` plans our tensors from a directory, `write` puts a model into an empty one that transformers 4 and 5 open. One
table of rules per family serves both directions; tensors go through one at a time and keep their bits. The config of
an imported model keeps its own keys, so that a model which nobody changed comes out as it went in.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import stream
from convert.hf.config import from_model, to_model
from convert.hf.families import Layout, layout_of, pairs
from convert.hf.files import common_dtype, open_checkpoint, read_json, usable
from convert.hf.tokenizer import TOKENIZER_FILES, write_tokenizer
from convert.rules import ConversionError
from convert.specials import GENERATION, Specials, of_tokenizer
from jaxlm.config import InputError, ModelConfig
from jaxlm.model_dir import Stored, write_json, write_shards
from jaxlm.tensor_file import Lazy, Planned
from jaxlm.tokenizer import Tokenizer

__all__ = ["TOKENIZER_FILES", "Source", "Written", "read", "write"]


_TOKENS = {"tokenizer.json", "tokenizer.model", "vocab.json"}  # files that hold a vocabulary


@dataclass(frozen=True)
class Source:
    """A Hugging Face directory, opened; no weight was read but a tied head."""

    config: ModelConfig
    family: str  # model_type
    layout: Layout  # of its experts
    raw_config: dict[str, Any]  # its config.json
    notes: tuple[str, ...]  # what is not carried over
    tensors: dict[str, Planned]  # ours, in the order of the model, in the dtypes stored
    carried: dict[str, Path]  # files that an export of the same model writes back: name -> where it is


@dataclass(frozen=True)
class Written:
    """What `write` made."""

    tensors: dict[str, Stored]  # by their name
    family: str
    layout: Layout
    notes: tuple[str, ...]  # what the config does not hold


def read(directory: Path) -> Source:
    """Opens a directory with config.json and safetensors.

    Raises ConversionError (or TensorFileError, for a damaged file) with everything that is wrong, a line each.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    damaged, tensors, imported = [], {}, None
    try:
        tensors = open_checkpoint(directory)
    except InputError as error:
        damaged.append(str(error))
    problems = _beyond(raw, len(tensors)) if tensors else []
    try:
        imported = None if problems else to_model(raw)
    except ConversionError as error:
        problems.append(str(error))
    problems += damaged
    if problems or imported is None:
        raise ConversionError("\n".join(problems))
    layout = layout_of(tensors)
    table = pairs(imported.config, imported.family, layout)
    planned = stream.here(table, usable(imported.config, table, tensors))
    carried = {name: directory / name for name in TOKENIZER_FILES if (directory / name).is_file()}
    more = directory / "additional_chat_templates"
    carried |= {f"{more.name}/{path.name}": path for path in sorted(more.glob("*.jinja"))}
    return Source(imported.config, imported.family, layout, raw, imported.notes, planned, carried)


def _beyond(raw: Mapping[str, Any], count: int) -> list[str]:
    """Counts of a config that its files cannot fill; refused before anything is made that often."""
    limits = {
        "num_hidden_layers": count,
        "num_local_experts": max(count, 4096),
        "num_experts": max(count, 4096),
    }
    return [
        f"config.json: {key}={raw[key]}, but the files hold {count} tensors in all"
        for key, limit in limits.items()
        if type(raw.get(key)) is int and raw[key] > limit
    ]


def write(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    *,
    dtype: np.dtype | None = None,
    family: str | None = None,
    layout: Layout | None = None,
    raw: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    carried: Mapping[str, Path] | None = None,
    specials: Specials | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int], None] = lambda n: None,
) -> Written:
    """Writes a model into an existing directory.

    Args:
        directory: where to; empty.
        config: the model.
        tensors: ours, by path.
        dtype: to cast to; None = as they are.
        family: model_type; None = that of `raw` if it still fits, or the first that computes the same.
        layout: of the experts; None = per_expert, which transformers 4 and 5 open.
        raw: the config.json the model was imported with.
        tokenizer: written unless `carried` holds one; its special ids are those of the config.
        specials: of the tokenizer; None = what its own names say.
        carried: files to copy verbatim, by name.
        max_shard_bytes: largest file of weights.
        progress: called with the number of bytes of weights written.

    Raises:
        ConversionError: no class of transformers computes this model, tensors do not fit the config, or weights are
            not finite (found while they are written).
    """
    directory, carried = Path(directory), dict(carried or {})
    own_tokenizer = None if _TOKENS & carried.keys() else tokenizer
    if own_tokenizer is not None and specials is None:
        specials = of_tokenizer(own_tokenizer)
    ids = specials.config_ids() if own_tokenizer is not None and specials is not None else None
    values, notes = from_model(config, "float32", raw, family, ids)  # refuses before anything is written
    chosen, layout = str(values["model_type"]), layout or "per_expert"
    planned = stream.there(pairs(config, chosen, layout), tensors, dtype)
    values, notes = from_model(config, common_dtype(planned.values()).name, raw, chosen, ids)
    with stream.finite(planned) as checked:
        stored = write_shards(directory, checked, "pt", max_shard_bytes, progress)
    write_json(directory / "config.json", values)
    for name, path in carried.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    if own_tokenizer is not None:
        assert specials is not None
        write_tokenizer(own_tokenizer, directory, config.context, chosen, specials)
        if GENERATION not in carried:
            write_json(directory / GENERATION, specials.generation_config())
    if layout == "fused" and config.moe.n_experts:
        notes = (
            *notes,
            "stacked experts are the layout of transformers 5; version 4 would start them at random",
        )
    return Written(stored, chosen, layout, notes)
