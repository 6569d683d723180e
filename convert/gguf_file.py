"""jaxlm <-> one GGUF file of llama.cpp's `llama` architecture, dense and MoE, with tokenizer.

llama.cpp rotates neighbouring pairs of a head, jaxlm the pairs (i, i + H/2): the columns of q and k are reordered per
head, each with its own number of heads. Matrices are F32, F16, BF16 or Q8_0; norms, biases and the router stay F32.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.gguf_config import (
    ARCHITECTURE,
    CONFIG_KEY,
    config_json,
    metadata,
    read_config,
    refused_fields,
    rope_factors,
)
from convert.gguf_header import Header, Stored, read_header, reader
from convert.gguf_tokenizer import read_specials, read_tokenizer, refused_tokenizer, tokenizer_metadata
from convert.rules import (
    FIRST_HALF,
    SAME,
    SECOND_HALF,
    TRANSPOSE,
    ConversionError,
    Pair,
    Rule,
    Transform,
    pair_up,
    require,
)
from convert.specials import Specials
from convert.stream import copy_blocked, finite, there
from jaxlm.config import ModelConfig
from jaxlm.model import abstract_model
from jaxlm.tensor_file import Lazy, Planned, rows_at_once
from jaxlm.tokenizer import Tokenizer

Kind = Literal["f32", "f16", "bf16", "q8_0"]
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type
LARGEST = {"F32": 3.4028234e38, "F16": 65504.0, "BF16": 3.3895e38, "Q8_0": 127 * 65504.0}
ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = 32  # values of a Q8_0 block; a row that is no multiple of it is written as F16


def interleaved(heads: int) -> Transform:
    """Half-split rotary pairs (i, i + H/2) on the last axis here, neighbours (2i, 2i + 1) on the first axis there."""

    def forward(x: np.ndarray) -> np.ndarray:
        split = x.reshape(*x.shape[:-1], heads, 2, x.shape[-1] // heads // 2)
        return np.swapaxes(split, -1, -2).reshape(x.shape).T

    def inverse(x: np.ndarray) -> np.ndarray:
        x = x.T
        split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads // 2, 2)
        return np.swapaxes(split, -1, -2).reshape(x.shape)

    return Transform(f"interleaved pairs of {heads} heads", forward, inverse)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The table; its only numbers are those of the heads."""
    block, there = r"blocks\.(\d+)\.", r"blk.\1."
    q, k = interleaved(config.n_heads), interleaved(config.n_kv_heads)
    return (
        Rule(r"embed\.weight", "token_embd.weight", SAME),
        Rule(r"final_norm\.weight", "output_norm.weight", SAME),
        Rule(r"lm_head\.weight", "output.weight", TRANSPOSE),
        Rule(block + r"attn_norm\.weight", there + "attn_norm.weight", SAME),
        Rule(block + r"mlp_norm\.weight", there + "ffn_norm.weight", SAME),
        Rule(block + r"attn\.q_proj\.(weight|bias)", there + r"attn_q.\2", q),
        Rule(block + r"attn\.k_proj\.(weight|bias)", there + r"attn_k.\2", k),
        Rule(block + r"attn\.v_proj\.weight", there + "attn_v.weight", TRANSPOSE),
        Rule(block + r"attn\.o_proj\.weight", there + "attn_output.weight", TRANSPOSE),
        Rule(block + r"attn\.v_proj\.bias", there + "attn_v.bias", SAME),
        Rule(block + r"attn\.o_proj\.bias", there + "attn_output.bias", SAME),
        Rule(block + r"mlp\.(gate|up|down)_proj\.weight", there + r"ffn_\2.weight", TRANSPOSE),
        Rule(block + r"mlp\.(gate|up|down)_proj\.bias", there + r"ffn_\2.bias", SAME),
        Rule(block + r"moe\.router\.weight", there + "ffn_gate_inp.weight", TRANSPOSE),
        Rule(block + r"moe\.experts\.gate_up", there + "ffn_gate_exps.weight", TRANSPOSE, FIRST_HALF),
        Rule(block + r"moe\.experts\.gate_up", there + "ffn_up_exps.weight", TRANSPOSE, SECOND_HALF),
        Rule(block + r"moe\.experts\.down", there + "ffn_down_exps.weight", TRANSPOSE),
    )


@functools.lru_cache(maxsize=8)
def pairs(config: ModelConfig) -> list[Pair]:
    """The table applied to one model, whatever its size. Shared by all callers: not to be changed."""
    return pair_up(rules(config), {path: tuple(s.shape) for path, s in abstract_model(config).shapes.items()})


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConversionError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


def refusals(config: ModelConfig, tokenizer: Tokenizer | None, specials: Specials | None = None) -> list[str]:
    """Everything that a GGUF file of this architecture cannot say about the model and its tokenizer, a line each."""
    refused = refused_tokenizer(tokenizer, config.vocab_size, specials) if tokenizer else []
    return refused_fields(config) + refused


def write(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    *,
    kind: Kind,
    tokenizer: Tokenizer | None,
    name: str,
    specials: Specials | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, str]:
    """Writes a model, tensor by tensor, in pieces; what could not be written whole is removed.

    Args:
        path: the new file; its directory is there.
        config: the model.
        tensors: our tensors by path, in any float dtype.
        kind: of the matrices. Under q8_0 a matrix whose rows are no multiple of 32 is written as F16.
        tokenizer: None writes a file that knows ids only.
        name: what the file calls the model.
        specials: of the tokenizer; None = what its own names say.
        progress: told the bytes of each piece written.

    Returns:
        SHA-256 of each tensor's bytes in the file, by the file's names.

    Raises:
        ConversionError: something is refused, missing or misshapen, or a value is beyond what `kind` can hold.
    """
    gguf = _library()
    problems = refusals(config, tokenizer, specials) + _refused_name(name)
    if problems:
        raise ConversionError("\n".join(problems))
    plans = there(pairs(config), tensors)
    factors = rope_factors(config)
    if factors is not None:
        plans = {ROPE_FACTORS: Planned.of(Lazy.of(factors))} | plans
    kinds = {name: _kind_of(name, plan.shape, kind) for name, plan in plans.items()}

    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    facts: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
    }
    facts |= {"general.quantization_version": gguf.GGML_QUANT_VERSION} if kind == "q8_0" else {}
    facts |= metadata(config) | {CONFIG_KEY: config_json(config)}
    facts |= tokenizer_metadata(tokenizer, config.vocab_size, specials)
    for key, value in facts.items():
        _add(writer, key, value)
    for target, plan in plans.items():
        quantised = gguf.GGMLQuantizationType[kinds[target]]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
        nbytes = int(np.prod(plan.shape)) // block * block_bytes
        writer.add_tensor_info(target, plan.shape, np.dtype(np.float32), nbytes, raw_dtype=quantised)
    try:
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with finite(plans) as checked, np.errstate(invalid="ignore"):
                digests = _write_values(writer, checked, kinds, progress)
        finally:
            writer.close()
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return digests


def _refused_name(name: str) -> list[str]:
    """llama.cpp gives special tokens other meanings in models called so."""
    taken = [known for known in ("phi-3", "phi3", "modern-bert") if known in name.lower()]
    return (
        [f"name={name!r}: llama.cpp treats {taken[0]} in a way of its own; take another name"]
        if taken
        else []
    )


def _kind_of(name: str, shape: tuple[int, ...], kind: Kind) -> str:
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % _BLOCK else kind.upper()


def _add(writer: Any, key: str, value: Any) -> None:
    """One metadata key; the type of the value decides the type in the file."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def _write_values(
    writer: Any, plans: Mapping[str, Planned], kinds: Mapping[str, str], progress: Callable[[int], None]
) -> dict[str, str]:
    """The tensors' bytes, each padded to the alignment; piece by piece, which the writer's own method cannot."""
    file, digests = writer.fout[0], {}
    writer.write_padding(file, file.tell())
    for name, plan in plans.items():
        total, digest = 0, hashlib.sha256()
        for piece in plan.pieces():
            raw = _encoded(name, piece, kinds[name]).reshape(-1).view(np.uint8).data
            file.write(raw)
            digest.update(raw)
            progress(len(raw))
            total += len(raw)
        writer.write_padding(file, total)
        digests[name] = digest.hexdigest()
    file.flush()
    os.fsync(file.fileno())
    return digests


def _encoded(name: str, piece: np.ndarray, kind: str) -> np.ndarray:
    """A piece of whole rows as the file holds it. Raises ConversionError on values that `kind` cannot hold."""
    gguf = _library()
    wide = piece if piece.dtype == np.float64 else piece.astype(np.float32)
    peak = float(np.max(np.abs(wide), initial=0))
    if LARGEST[kind] < peak < np.inf:
        raise ConversionError(
            f"{name}: {kind} cannot hold {peak:g}, its largest is {LARGEST[kind]:g}; try bf16 or f32"
        )
    with np.errstate(all="ignore"):  # as the quantiser divides by the size of the smallest blocks
        single = np.ascontiguousarray(wide, np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(single, gguf.GGMLQuantizationType[kind]))


@dataclass(frozen=True)
class Source:
    """A model in a file: its config, our tensors by path (still unread), its tokenizer, and what was left aside."""

    config: ModelConfig
    tensors: dict[str, Planned]
    tokenizer: Tokenizer | None
    specials: Specials | None  # what the file says of its special tokens
    notes: list[str]


def read(path: Path) -> Source:
    """Reads a file of this architecture; F32, F16 and BF16 come back bit for bit, Q8_0 as float32.

    Raises:
        ConversionError: the file is no such model, is damaged, or holds what is not read; one line per fault.
    """
    path = Path(path)
    header = read_header(path)
    try:
        return _read(path, header)
    except ConversionError as error:
        raise ConversionError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _read(path: Path, header: Header) -> Source:
    stored = dict(header.tensors)
    factors = stored.pop(ROPE_FACTORS, None)
    if factors is not None and (factors.kind != "F32" or len(factors.shape) != 1):
        raise ConversionError(
            f"{ROPE_FACTORS}: must be F32 with one axis, it is {factors.kind} {factors.shape}"
        )
    values = None if factors is None else reader(path, factors)()
    config, notes = read_config(header.metadata, stored, values)
    groups: dict[str, list[Pair]] = {}
    table = pairs(config)
    require(table, stored, inverse=True)
    for pair in table:
        groups.setdefault(pair.path, []).append(pair)
    plans = {ours: _planned(path, group, stored) for ours, group in groups.items()}
    tokenizer, remark = read_tokenizer(header.metadata, config.vocab_size)
    return Source(config, plans, tokenizer, read_specials(header.metadata, config.vocab_size), notes + remark)


def _planned(path: Path, group: list[Pair], stored: Mapping[str, Stored]) -> Planned:
    """One tensor of ours from those of the file; experts are read a few at a time, other tensors whole."""
    shape = group[0].shape
    kinds = {stored[pair.other].dtype for pair in group}
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # which holds every kind
    experts = ".experts." in group[0].path  # whose transforms act within each

    def pieces() -> Iterator[np.ndarray]:
        raws = [(pair, stored[pair.other].kind, reader(path, stored[pair.other])()) for pair in group]
        step = rows_at_once(shape, dtype)
        if not experts:
            views = [(p.index, p.transform.view(_decoded(raw, kind), inverse=True)) for p, kind, raw in raws]
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            if experts:
                views = [
                    (p.index, p.transform.view(_decoded(raw[rows], kind), inverse=True))
                    for p, kind, raw in raws
                ]
            piece = np.empty((rows.stop - start, *shape[1:]), dtype)
            for index, view in views:
                copy_blocked(piece[(slice(None), *index[1:])], view if experts else view[rows])
            yield piece

    return Planned(shape, dtype, pieces)


def _decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind != "Q8_0":
        return raw
    gguf = _library()
    with np.errstate(all="ignore"):  # scales of damaged blocks may be infinite
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
