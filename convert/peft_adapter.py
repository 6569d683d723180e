"""Low-rank adapters (LoRA): their configuration, merging, and the directory that the peft library reads and writes.

An adapter is a flat dict: for a weight `w` [in, out] of the model `w.lora_a` [in, R] and `w.lora_b` [R, out]; for
stacked experts [E, in, out] the factors are [E, in, R] and [E, R, out]. The adapted weight is W + scale * a @ b with
scale = alpha / R (Hu et al. 2021, arXiv 2106.09685, section 4.1) or alpha / sqrt(R) (rsLoRA, Kalajdzievski 2023, arXiv
2312.03732).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import peft_layout as layout
from convert.peft_layout import Piece, Slot
from convert.rules import ConversionError, Pair
from jaxlm.adapter_config import ADAPTABLE, AdapterConfig, Override, factor_shapes
from jaxlm.config import ConfigError, from_dict
from jaxlm.json_file import read_object
from jaxlm.model_dir import Stored, write_json, write_tensors
from jaxlm.tensor_file import Lazy, Planned, open_file

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Adapter = dict[str, np.ndarray]


def require(
    adapter: Mapping[str, np.ndarray], config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """The paths that have an adapter, in the order of the model.

    Raises ConversionError with every missing, misshapen and unknown factor, one line each.
    """
    paths = [path for path in shapes if config.adapts(path)]
    expected = {
        f"{path}.{name}": shape
        for path in paths
        for name, shape in zip(
            ("lora_a", "lora_b"), factor_shapes(shapes[path], config.rank_alpha(path)[0]), strict=True
        )
    }
    problems = [f"{name}: missing, the targets name its weight" for name in expected if name not in adapter]
    problems += [
        f"{name}: got {tuple(adapter[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in adapter and tuple(adapter[name].shape) != shape
    ]
    problems += [
        f"{name}: no weight that the targets name has such a factor"
        for name in adapter
        if name not in expected
    ]
    if not paths:
        problems.append(
            f"targets={list(config.targets)} name no weight of this model that can carry an adapter"
        )
    _raise(problems, "the adapter does not fit the model")
    return paths


def _raise(problems: list[str], what: str) -> None:
    if problems:
        raise ConversionError(f"{what}, {len(problems)} problems:\n" + "\n".join(problems))


def merge(
    params: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], config: AdapterConfig
) -> dict[str, np.ndarray]:
    """W + scale * a @ b for every adapted weight, in its dtype; the others are the same arrays.

    Products and sums are done in float32 at least, one weight at a time. Raises ConversionError as `require`.
    """
    return _added(params, adapter, config, 1.0)


def unmerge(
    params: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], config: AdapterConfig
) -> dict[str, np.ndarray]:
    """The weights before `merge`, but for the rounding of two sums."""
    return _added(params, adapter, config, -1.0)


def _added(
    params: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], config: AdapterConfig, sign: float
) -> dict[str, np.ndarray]:
    result = dict(params)
    for path in require(adapter, config, {path: tuple(w.shape) for path, w in params.items()}):
        weight, a, b = map(np.asarray, (params[path], adapter[f"{path}.lora_a"], adapter[f"{path}.lora_b"]))
        wide = np.result_type(weight.dtype, a.dtype, b.dtype, np.float32)
        delta = a.astype(wide, copy=False) @ b.astype(wide, copy=False)
        delta *= sign * config.scale(path)
        delta += weight
        result[path] = delta.astype(weight.dtype)
    return result


def write_adapter(
    directory: Path,
    adapter: Mapping[str, np.ndarray],
    config: AdapterConfig,
    pairs: Iterable[Pair],
    base_name: str = "",
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Stored]:
    """Writes adapter_config.json and adapter_model.safetensors into an existing directory, in the adapter's dtypes.

    `pairs` is the table of the base model and decides the layout: with stacked experts the adapter is for transformers
    5; with a matrix per expert for transformers 4 and what follows it: there gate and up share their lora_A. (Of
    these, peft under transformers 5 opens Mixtral's rightly where all layers are adapted with one rank and alpha and
    without rsLoRA.) `base_name` is the model that peft's Auto classes load.

    Returns:
        Where each tensor lies, and its hash.

    Raises:
        ConversionError: the adapter does not fit the table, or peft has no place for it; all reasons at once.
    """
    pairs = list(pairs)
    require(adapter, config, {pair.path: pair.shape for pair in pairs})
    table = layout.slots(pairs)
    adapted = [slot for slot in table if config.adapts(slot.pair.path)]
    known = {slot.pair.path for slot in adapted}
    problems = [
        f"{pair.path} -> {pair.other}: the {pair.transform.name!r} layout has no adapter"
        for pair in pairs
        if config.adapts(pair.path) and pair.path not in known
    ]
    if config.dropout and any(slot.as_parameter for slot in adapted):
        problems.append(
            f"dropout={config.dropout}: peft has none for adapters of stacked experts; set it to 0, which changes"
            " nothing about a trained adapter"
        )
    problems += [f"{name}: holds NaN or infinity" for name, x in adapter.items() if not np.isfinite(x).all()]
    _raise(problems, "peft cannot hold this adapter")
    tensors: dict[str, Planned] = {}
    for slot, name in layout.carriers(adapted):
        path = slot.pair.path
        factors = slot.outward(adapter[f"{path}.lora_a"], adapter[f"{path}.lora_b"])
        for letter, array in zip("AB", factors, strict=True):
            tensors[f"{name}.lora_{letter}.weight"] = Planned.of(Lazy.of(array))
    stored = write_tensors(Path(directory), TENSORS, tensors, "pt", progress)
    write_json(Path(directory) / CONFIG, _fields(config, adapted, table, base_name))
    return stored


def _fields(config: AdapterConfig, adapted: list[Slot], table: list[Slot], base_name: str) -> dict[str, Any]:
    """adapter_config.json; what only newer versions of peft know is written only where it says something."""
    ranks = {slot.target: config.rank_alpha(slot.pair.path)[0] for slot in adapted}
    alphas = {slot.target: _plain(config.rank_alpha(slot.pair.path)[1]) for slot in adapted}
    targets = layout.targets(adapted, table)
    if not targets["target_parameters"]:
        del targets["target_parameters"]
    return targets | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": layout.patterns(ranks, config.rank),
        "alpha_pattern": layout.patterns(alphas, _plain(config.alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def read_adapter(directory: Path, pairs: Iterable[Pair]) -> tuple[AdapterConfig, Adapter]:
    """Reads what peft saved for a base model with this table (of the layout that the adapter was made for).

    Where gate and up of an expert are two matrices there with factors of their own, ours have the sum of both ranks:
    a = [a_gate | a_up], b = [[b_gate, 0], [0, b_up]], with alpha grown so that the scale stays. Equal lora_A of
    both are taken once. Factors of unequal rank are padded with zeros; those of unequal scale take the first one's
    scale and have the ratio in b.

    Raises:
        ConversionError: every field that cannot be expressed and every missing, misshapen or unknown tensor.
    """
    directory, pairs = Path(directory), list(pairs)
    fields = _read_fields(directory)
    _raise(layout.refusals(fields), f"{directory / CONFIG} cannot be read")
    base = _base_config(fields, directory)
    table, targets = layout.slots(pairs), layout.Targets(fields)
    keys = {slot.pair.other: key for slot in table if (key := targets.key(slot))}
    tensors = open_file(directory / TENSORS)
    problems, pieces = targets.unmatched(table), {}
    if not keys:
        problems.append(f"{CONFIG} targets no weight of this model")
    for slot, name in layout.carriers(slot for slot in table if slot.pair.other in keys):
        key = keys[slot.pair.other]
        rank = layout.looked_up(fields.get("rank_pattern") or {}, key, base.rank)
        alpha = layout.looked_up(fields.get("alpha_pattern") or {}, key, base.alpha)
        names = [f"{name}.lora_{letter}.weight" for letter in "AB"]
        shapes = slot.factor_shapes(rank)
        faults = [_fault(tensors, *facts, rank) for facts in zip(names, shapes, strict=True)]
        problems += filter(None, faults)
        if not any(faults):
            factors = slot.inward(*(tensors[one].read() for one in names))
            pieces.setdefault(slot.pair.path, []).append(Piece(slot.pair.index, *factors, rank, alpha))
        for one in names:
            tensors.pop(one, None)
    problems += [f"{name}: unused{_why(name)}" for name in tensors]
    _raise(problems, f"{directory} is no adapter for this model")
    order = dict.fromkeys(slot.pair.path for slot in table)
    return _assembled(base, {path: pieces[path] for path in order if path in pieces}, pairs)


def _fault(tensors: Mapping[str, Lazy], name: str, shape: tuple[int, int], rank: int) -> str:
    if name not in tensors:
        return f"{name}: missing, {CONFIG} targets its weight"
    got = tensors[name].shape
    if got != shape:
        return f"{name}: got {got}, expected {shape} at rank {rank} of {CONFIG}"
    if tensors[name].dtype.kind in "iub":
        return f"{name}: holds {tensors[name].dtype}, which is no floating-point factor"
    return "" if np.isfinite(tensors[name].read()).all() else f"{name}: holds NaN or infinity"


def _why(name: str) -> str:
    if name.endswith(".base_layer.weight"):
        return ", a weight of the base model that peft saved along: save with save_embedding_layers=False"
    if "lora_embedding" in name or "embed_tokens" in name:
        return ", adapters of embeddings are not supported"
    if "lora_magnitude_vector" in name:
        return ", DoRA is not supported"
    if re.search(r"\.lora_[AB]\.weight$", name):
        return f", {CONFIG} does not target its weight, or this model has none of the name"
    return ", only lora_A and lora_B are supported"


def _read_fields(directory: Path) -> dict[str, Any]:
    """adapter_config.json; ConversionError if it or the tensors are not there, or it is no JSON object."""
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            pickled = f"; {PICKLE} is a pickle, which is never read: save it again as safetensors"
            hint = pickled if name == TENSORS and (directory / PICKLE).exists() else ""
            raise ConversionError(f"{directory / name}: no such file{hint}")
    try:
        return read_object(directory / CONFIG)
    except ValueError as error:
        raise ConversionError(f"{directory / CONFIG}: {error}") from None


def _base_config(fields: dict[str, Any], directory: Path) -> AdapterConfig:
    """Rank, alpha and dropout as the file has them; what it leaves out has peft's defaults."""
    named = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
    values = {"rank": 8, "alpha": 8} | {ours: fields[key] for key, ours in named.items() if key in fields}
    try:
        return from_dict(AdapterConfig, values)
    except ConfigError as error:
        raise ConversionError(f"{directory / CONFIG}: {error}") from None


def _assembled(
    base: AdapterConfig, pieces: dict[str, list[Piece]], pairs: list[Pair]
) -> tuple[AdapterConfig, Adapter]:
    """All factors in our layout, and the config that says so in as few regular expressions as there are kinds."""
    shapes = {pair.path: pair.shape for pair in pairs}
    adapter: Adapter = {}
    numbers: dict[str, tuple[int, float]] = {}
    for path, group in pieces.items():
        a, b, rank, alpha = layout.joined(shapes[path], group, base.rslora)
        adapter |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        numbers[path] = rank, float(alpha)
    others = dict.fromkeys(pair for pair in numbers.values() if pair != (base.rank, base.alpha))
    overrides = [
        Override(text, *pair)
        for pair in others
        for text in _expressions([path for path, mine in numbers.items() if mine == pair], numbers)
    ]
    config = AdapterConfig(
        base.rank,
        float(base.alpha),
        base.dropout,
        base.rslora,
        tuple(_expressions(numbers, [path for path in shapes if ADAPTABLE.fullmatch(path)])),
        tuple(overrides),
    )
    return config, adapter


def _expressions(chosen: Iterable[str], table: Iterable[str]) -> list[str]:
    """Regular expressions for these paths and no others of the table, one where all layers are alike."""
    names = layout.grouped(list(chosen), list(table), lambda path: re.sub(r"\.\d+\.", ".#.", path, count=1))
    return [re.escape(name).replace(r"\#", r"\d+") for name in names]
