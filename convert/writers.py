"""What `export` writes: one function per format, each into a directory that is still hidden.

Every writer takes an opened target and returns where its tensors lie, with their hashes, for the manifest.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from convert import carry, stream
from convert.targets import FACTS, OPTIMIZER, Moments, Target
from jaxlm import model_dir
from jaxlm.config import ConfigError, save
from jaxlm.model_dir import CONFIG, Progress, Stored
from jaxlm.tensor_file import Lazy, Planned
from jaxlm.tokenizer import Tokenizer, TokenizerError

Format = Literal["jaxlm", "torch", "pt", "hf", "gguf", "onnx", "gptoss"]
Dtype = Literal["", "float32", "bfloat16", "float16", "float64", "q8_0"]
DTYPES: dict[str, np.dtype | None] = {
    "": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True)
class Choices:
    """What can be said about an export."""

    dtype: Dtype = ""  # '' = as it is stored
    tokenizer: bool = True  # False leaves it out
    optimizer: bool = True  # False leaves AdamW's state out
    family: str | None = None  # hf: '' = the first that expresses the model
    experts: str | None = None  # hf: per_expert or fused; '' = what transformers 4 and 5 both open
    max_shard_bytes: int = 5_000_000_000


class Written(NamedTuple):
    """What a writer has to tell."""

    tensors: dict[str, Stored]  # for the manifest
    notes: tuple[str, ...] = ()


Writer = Callable[[Target, Path, Choices, Progress], Written]


def dtype_of(choices: Choices) -> np.dtype | None:
    """The dtype that weights are rounded to, None = as stored. Raises ConfigError for GGUF's own kinds."""
    if choices.dtype not in DTYPES:
        raise ConfigError(
            f"--dtype {choices.dtype} is for --to gguf only; choose {', '.join(filter(None, DTYPES))}"
        )
    return DTYPES[choices.dtype]


def write_jaxlm(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """A model directory in jaxlm's names and layouts."""
    contents = target.contents
    plans = stream.cast(contents.tensors, dtype_of(choices))
    with stream.finite(plans) as checked:
        stored = model_dir.write_shards(out, checked, "jaxlm", choices.max_shard_bytes, progress)
    save(target.config, out / CONFIG)
    if choices.optimizer and contents.moments is not None:
        parts = _slots(contents.moments, ("m", "v"), lambda part: stream.cast(part, None))
        stored |= _write_moments(out, parts, contents.moments.step, "jaxlm", progress)
    return Written(stored, carry.keep(target, out, choices.dtype, choices.tokenizer))


def write_torch(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """A torchref checkpoint: one model.safetensors with [out, in] weights, which `torchref.checkpoint` opens."""
    from convert import native

    contents, pairs = target.contents, native.pairs(target.config)
    plans = stream.there(pairs, contents.tensors, dtype_of(choices))
    with stream.finite(plans) as checked:
        stored = model_dir.write_tensors(out, "model.safetensors", checked, "pt", progress)
    save(target.config, out / CONFIG)
    if choices.optimizer and contents.moments is not None:
        parts = _slots(contents.moments, ("exp_avg", "exp_avg_sq"), lambda part: stream.there(pairs, part))
        stored |= _write_moments(out, parts, contents.moments.step, "pt", progress)
    return Written(stored, carry.keep(target, out, choices.dtype, choices.tokenizer))


def write_pt(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """model.pt, a plain state dict for torchref's decoder, and its config.json."""
    from convert import native, pt_file

    plans = stream.there(native.pairs(target.config), target.contents.tensors, dtype_of(choices))

    def made(plans: Mapping[str, Planned]) -> Iterator[tuple[str, np.ndarray]]:
        for name, plan in plans.items():
            yield name, stream.array(plan)
            progress(plan.nbytes)

    with stream.finite(plans) as checked:
        pt_file.write(out, target.config, made(checked))
    return Written({}, carry.keep(target, out, choices.dtype, choices.tokenizer))


def write_hf(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """A Hugging Face directory of the family that expresses the model."""
    from convert import hf

    contents = target.contents
    if choices.tokenizer:
        carry.require_vocabulary(target, target.config)
    tokenizer = (
        carry.tokenizer_of(target) if choices.tokenizer and "tokenizer.json" not in contents.carried else None
    )
    written = hf.write(
        out,
        target.config,
        contents.tensors,
        dtype=dtype_of(choices),
        family=choices.family,
        layout=choices.experts,  # type: ignore[arg-type]
        raw=contents.raw,
        tokenizer=tokenizer,
        carried=carry.carried(target, choices.tokenizer),
        specials=target.specials,
        max_shard_bytes=choices.max_shard_bytes,
        progress=progress,
    )
    lacking = choices.tokenizer and tokenizer is None and "tokenizer.json" not in contents.carried
    missing = ("no tokenizer: there is no tokenizer.json beside the weights",) if lacking else ()
    return Written(written.tensors, (*written.notes, *missing))


def write_gguf(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """model.gguf for llama.cpp."""
    from convert import gguf_file
    from convert.gguf_header import read_header

    kind = gguf_kind(target, choices.dtype)
    tokenizer = gguf_tokenizer(target) if choices.tokenizer else None
    digests = gguf_file.write(
        out / "model.gguf",
        target.config,
        target.contents.tensors,
        kind=kind,
        tokenizer=tokenizer,
        specials=target.specials,
        name=target.path.resolve().name,
        progress=progress,
    )
    found = read_header(out / "model.gguf").tensors
    return Written(
        {
            name: Stored(
                "model.gguf",
                found[name].kind,
                found[name].shape,
                found[name].offset,
                found[name].nbytes,
                digest,
            )
            for name, digest in digests.items()
        }
    )


def gguf_kind(target: Target, dtype: str) -> Any:
    """GGUF's word for a dtype, or for the one that is stored. Raises ConfigError where it has none."""
    kinds = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
    dtype = dtype or next(iter(target.contents.tensors.values())).dtype.name
    if dtype not in kinds:
        raise ConfigError(f"GGUF has no {dtype}: choose --dtype float32, float16, bfloat16 or q8_0")
    return kinds[dtype]


def gguf_tokenizer(target: Target) -> Tokenizer:
    """The tokenizer of a target. Raises ConfigError with every reason why llama.cpp would not give its ids."""
    from convert.gguf_tokenizer import refused_tokenizer

    advice = "--no-tokenizer writes a file without"
    try:
        tokenizer = carry.tokenizer_of(target)
    except TokenizerError as error:
        raise ConfigError(f"{error}; {advice}") from None
    if tokenizer is None:
        raise ConfigError(f"{target.path} has no tokenizer that GGUF could carry; {advice}")
    refused = refused_tokenizer(tokenizer, target.config.vocab_size, target.specials)
    if refused:
        raise ConfigError("\n".join([*refused, advice]))
    return tokenizer


def write_onnx(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """model.onnx for onnxruntime: prefill and cached step in one graph."""
    from convert import onnx_graph

    with stream.finite(stream.cast(target.contents.tensors, None)) as checked:
        for plan in checked.values():
            for _ in plan.pieces():
                pass
    facts = onnx_graph.write(out, target.decoder.cpu(), dtype=choices.dtype or "float32", progress=progress)
    save(target.config, out / CONFIG)
    notes = carry.keep(target, out, choices.dtype, choices.tokenizer)
    return Written({}, (*notes, *facts.get("notes", ())))


def write_gptoss(target: Target, out: Path, choices: Choices, progress: Progress) -> Written:
    """model.pt under gptoss's own parameter names."""
    from convert import gptoss

    contents = target.contents
    moments = contents.moments if choices.optimizer else None
    step = contents.moments.step if contents.moments is not None else 0

    plans = stream.cast(contents.tensors, dtype_of(choices))
    if moments is not None:
        plans |= _slots(moments, ("m", "v"), lambda part: stream.cast(part, None))

    parts: dict[str, dict[str, Lazy]] = {"": {}, "m": {}, "v": {}}
    with stream.finite(plans) as checked:
        for name, plan in checked.items():
            slot, _, path = name.rpartition(":")
            parts[slot][path] = stream.lazy(plan)
        tensors, m, v = parts.values()
        kept = None if moments is None else Moments(m, v, moments.step)
        gptoss.write(out / "model.pt", target.config, tensors, step=step, moments=kept, progress=progress)
    return Written({}, carry.keep(target, out, choices.dtype, choices.tokenizer))


WRITERS: dict[str, Writer] = {
    "jaxlm": write_jaxlm,
    "torch": write_torch,
    "pt": write_pt,
    "hf": write_hf,
    "gguf": write_gguf,
    "onnx": write_onnx,
    "gptoss": write_gptoss,
}


def _slots(
    moments: Moments, names: tuple[str, str], layout: Callable[[Mapping[str, Lazy]], dict[str, Planned]]
) -> dict[str, Planned]:
    return {
        f"{slot}:{path}": planned
        for slot, part in zip(names, (moments.m, moments.v), strict=True)
        for path, planned in layout(part).items()
    }


def _write_moments(
    out: Path, parts: dict[str, Planned], step: int, format: str, progress: Progress
) -> dict[str, Stored]:
    with stream.finite(parts) as checked:
        stored = model_dir.write_tensors(out, OPTIMIZER, checked, format, progress)
    (out / FACTS).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    return stored
