"""gptoss's own checkpoints (`step_*.pt`, `latest.pt`) <-> the model of the preset gptoss-original.

A file is torch.save of {step, model, optimizer, val_loss, cfg}: a state dict, AdamW's state dict and the fields of its
configuration. What the model is, the shapes say; cfg must agree, and adds what shapes cannot tell. Nothing of a file is
executed, and neither side is ever whole in memory: tensors are mapped when read and filled in place when written.

Rotary positions are half-split there as here: `cos_cached` and `sin_cached` are [C, H], the table [C, H/2] twice, side
by side, in float32. They are buffers: checked against jaxlm.rope_table and dropped, and made anew in a file written.
"""

import math
import mmap
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from convert.gptoss_form import (
    BUFFER,
    ORIGINAL,
    SPELLINGS,
    cfg_of,
    config_of,
    decay_groups,
    names_of,
    require_form,
    rope_problems,
)
from convert.rules import EACH, SAME, TRANSPOSE, ConversionError, Pair, Rule, pair_up
from convert.stream import array, here, there
from convert.tree import BFLOAT16, to_numpy
from jaxlm.config import InputError, ModelConfig, OptimConfig
from jaxlm.model import abstract_model
from jaxlm.rope_table import rope_table
from jaxlm.tensor_file import Lazy, Planned

if TYPE_CHECKING:
    import torch

    from convert.optstate import AdamMoments

RULES: tuple[Rule, ...] = (
    Rule(r"embed\.weight", "embed.weight", SAME),
    Rule(r"blocks\.(\d+)\.attn_norm\.weight", r"layers.\1.norm1.weight", SAME),
    Rule(r"blocks\.(\d+)\.attn\.([qkv])_proj\.weight", r"layers.\1.gqa.W_\2.weight", TRANSPOSE),
    Rule(r"blocks\.(\d+)\.attn\.([qkv])_proj\.bias", r"layers.\1.gqa.W_\2.bias", SAME),
    Rule(r"blocks\.(\d+)\.attn\.o_proj\.weight", r"layers.\1.gqa.out_proj.weight", TRANSPOSE),
    Rule(r"blocks\.(\d+)\.attn\.o_proj\.bias", r"layers.\1.gqa.out_proj.bias", SAME),
    Rule(r"blocks\.(\d+)\.attn\.bias_table", r"layers.\1.gqa.attention_bias", SAME),
    Rule(r"blocks\.(\d+)\.mlp_norm\.weight", r"layers.\1.norm2.weight", SAME),
    Rule(r"blocks\.(\d+)\.moe\.router\.weight", r"layers.\1.moe.router.W_r.weight", TRANSPOSE),
    Rule(r"blocks\.(\d+)\.moe\.experts\.up", r"layers.\1.moe.experts.{e}.fc1.weight", TRANSPOSE, EACH),
    Rule(r"blocks\.(\d+)\.moe\.experts\.up_bias", r"layers.\1.moe.experts.{e}.fc1.bias", SAME, EACH),
    Rule(r"blocks\.(\d+)\.moe\.experts\.down", r"layers.\1.moe.experts.{e}.fc2.weight", TRANSPOSE, EACH),
    Rule(r"blocks\.(\d+)\.moe\.experts\.down_bias", r"layers.\1.moe.experts.{e}.fc2.bias", SAME, EACH),
    Rule(r"final_norm\.weight", "norm.weight", SAME),
    Rule(r"lm_head\.weight", "out_head.weight", TRANSPOSE),
    Rule(r"lm_head\.bias", "out_head.bias", SAME),
)

_KEYS = ("step", "model", "optimizer", "val_loss", "cfg")
_FLOATS = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}


@dataclass(frozen=True)
class Moments:
    """AdamW's moments that are still in their file, in jaxlm's names and layouts."""

    m: dict[str, Planned]
    v: dict[str, Planned]
    step: int  # updates done, the same for every parameter

    def arrays(self) -> "AdamMoments":
        """The moments in memory: two floats for each parameter of the model."""
        from convert.optstate import AdamMoments

        m, v = ({path: array(plan) for path, plan in part.items()} for part in (self.m, self.v))
        return AdamMoments(m, v, self.step)


class AnyMoments(Protocol):
    """AdamW's moments in jaxlm's names and layouts, in memory (convert.optstate.AdamMoments) or in their files."""

    @property
    def m(self) -> Mapping[str, Any]:
        """Running mean of the gradients: arrays, or Lazy."""
        ...

    @property
    def v(self) -> Mapping[str, Any]:
        """Running mean of their squares."""
        ...

    @property
    def step(self) -> int:
        """Updates done."""
        ...


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: tensors in jaxlm's names and layouts, unread, and what else the file says."""

    config: ModelConfig
    tensors: dict[str, Planned]
    step: int  # optimizer steps done; 0 for a bare state dict
    val_loss: float | None  # with gptoss's balance term inside; None where the file has no finite one
    notes: list[str]  # what was assumed or left out, a line each
    moments: Moments | None

    @property
    def optimizer(self) -> "AdamMoments | None":
        """The moments read into memory, None where the file has none."""
        return None if self.moments is None else self.moments.arrays()


def pairs(config: ModelConfig) -> list[Pair]:
    """The table applied to one model, whatever its size."""
    return pair_up(RULES, {path: tuple(s.shape) for path, s in abstract_model(config).shapes.items()})


# Reading.


def read(path: Path, optimizer: bool = True) -> Source:
    """Opens a checkpoint, or a bare state dict; a compiled model's prefix `_orig_mod.` is taken off.

    Args:
        path: the file.
        optimizer: whether AdamW's moments are wanted, and must then fit.

    Raises:
        ConversionError: the file is absent, damaged or would execute code; or every tensor, key of cfg and moment that
            does not fit, a line each.
    """
    path = Path(path)
    content = _load(path)
    problems: list[str] = []
    notes: list[str] = []
    state, cfg, rest = _parts(path, content)
    tensors = _tensors(path, state, problems)
    if problems:
        raise ConversionError(_report(path, problems))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = config_of(cfg, shapes)
        table = pairs(config)
    except InputError as error:
        raise ConversionError(_report(path, str(error).splitlines())) from None
    problems += rope_problems(config, tensors, notes)
    weights = {name: tensor for name, tensor in tensors.items() if not BUFFER.fullmatch(name)}
    planned = _collected(lambda: here(table, weights), problems)
    step, val_loss = _numbers(rest, problems, notes)
    moments = None
    if optimizer and not problems and rest.get("optimizer") is not None:
        moments = _moments(path, rest["optimizer"], weights, table, step, problems, notes)
    if problems:
        raise ConversionError(_report(path, problems))
    known = {key for keys in SPELLINGS.values() for key in keys}
    notes += [
        f"cfg {repr(k)[1:-1]}={repr(v)[:80]} is not known and was not used"
        for k, v in cfg.items()
        if k not in known
    ]
    if not cfg:
        moe = config.moe
        notes.append(
            f"no cfg in the file: top_k={moe.n_active}, capacity_factor={moe.capacity_factor}, "
            f"dropout={config.dropout} and aux_loss_coef={moe.balance_coef} are gptoss's defaults"
        )
    return Source(config, planned or {}, step, val_loss, notes, moments)


def _report(path: Path, problems: Sequence[str]) -> str:
    head = f"{path}: not a checkpoint of gptoss that can be read"
    return f"{head}: {problems[0]}" if len(problems) == 1 else "\n".join([f"{head}:", *problems])


def _load(path: Path) -> Any:
    import torch

    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}") from None
    if head != b"PK\x03\x04":
        raise ConversionError(f"{path}: not a file of torch.save, which makes zip archives")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch passes on whatever its parsers meet in a damaged file
        text = " ".join(str(error).split())
        if named := re.search(r"GLOBAL `?([\w.]+)", text):
            raise ConversionError(
                f"{path}: holds a pickled {named[1]}, and reading that may run code; only tensors, numbers, "
                "strings, lists and dictionaries are read"
            ) from None
        reason = text.partition("Trying to load ")[2] or text
        raise ConversionError(f"{path}: damaged or truncated ({reason.partition('. ')[0][:160]})") from None


def _parts(path: Path, content: Any) -> tuple[Mapping[Any, Any], Mapping[str, Any], Mapping[str, Any]]:
    """The state dict, cfg and the other keys of a file that is a checkpoint or only a state dict."""
    import torch

    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        cfg = content.get("cfg") or {}
        if not isinstance(cfg, Mapping) or not all(isinstance(key, str) for key in cfg):
            raise ConversionError(f"{path}: cfg must be a dictionary of fields, got {type(cfg).__name__}")
        return content["model"], cfg, content
    if (
        isinstance(content, Mapping)
        and content
        and all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        return content, {}, {}
    has = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise ConversionError(
        f"{path}: neither a checkpoint (a dictionary with {', '.join(_KEYS)}) nor a state dict; it holds {has}"
    )


def _tensors(path: Path, state: Mapping[Any, Any], problems: list[str]) -> dict[str, Lazy]:
    """A state dict in its own order, without `_orig_mod.`, its values unread."""
    tensors: dict[str, Lazy] = {}
    for key, value in state.items():
        name = re.sub(r"(^|\.)_orig_mod\.", r"\1", repr(str(key))[1:-1])
        if name in tensors:
            problems.append(f"{name}: stands twice, with and without _orig_mod.")
        lazy = _lazy(path, name, value, problems)
        if lazy is not None:
            tensors[name] = lazy
    return tensors


def _lazy(path: Path, name: str, value: Any, problems: list[str]) -> Lazy | None:
    import torch

    if not isinstance(value, torch.Tensor):
        problems.append(f"{name}: is a {type(value).__name__}, not a tensor")
        return None
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in _FLOATS or value.layout != torch.strided or value.device.type != "cpu":
        problems.append(f"{name}: a {value.layout} {kind} tensor on {value.device}, expected plain floats")
        return None
    stored = value.untyped_storage().nbytes()
    if stored < value.numel() * value.element_size():
        problems.append(
            f"{name}: {tuple(value.shape)} of {kind}, but the file has only {stored} bytes for it"
        )
        return None
    return Lazy(tuple(value.shape), np.dtype(_FLOATS[kind]), lambda: to_numpy(value), str(path))


def _collected(plan: Callable[[], dict[str, Planned]], problems: list[str]) -> dict[str, Planned] | None:
    """A plan, or its tensors' problems among the others."""
    try:
        return plan()
    except ConversionError as error:
        problems += str(error).splitlines()[1:]
        return None


def _numbers(rest: Mapping[str, Any], problems: list[str], notes: list[str]) -> tuple[int, float | None]:
    """step and val_loss."""
    step, loss = rest.get("step", 0), rest.get("val_loss")
    if type(step) is not int or step < 0:
        problems.append(f"step={step!r} must be a count")
    if loss is not None and type(loss) not in (int, float):
        notes.append(f"val_loss is a {type(loss).__name__}, not a number, and was left out")
        loss = None
    notes += [f"key {key!r} of the file was left out" for key in rest if key not in _KEYS]
    return step, float(loss) if loss is not None and math.isfinite(loss) else None


def _moments(
    path: Path,
    state: Any,
    weights: Mapping[str, Lazy],
    table: list[Pair],
    step: int,
    problems: list[str],
    notes: list[str],
) -> Moments | None:
    """AdamW's state dict by parameter name; its indices count through the groups, each in the model's order."""
    found: list[str] = []
    entries = _entries(state, weights, found)
    if entries == {} and not found:
        notes.append("the optimizer of the file has no moments")
        return None
    parts: dict[str, dict[str, Lazy]] = {"exp_avg": {}, "exp_avg_sq": {}}
    steps: dict[str, float] = {}
    for name, entry in entries.items():
        for slot, part in parts.items():
            lazy = _lazy(path, f"optimizer {slot} of {name}", entry.get(slot), found)
            if lazy is not None and lazy.shape != weights[name].shape:
                found.append(f"optimizer {slot} of {name}: got {lazy.shape}, expected {weights[name].shape}")
            elif lazy is not None:
                part[name] = lazy
        try:
            steps[name] = float(entry["step"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            found.append(f"optimizer step of {name}: no number")
        found += [f"optimizer {slot} of {name}: unknown" for slot in entry if slot not in (*parts, "step")]
    updates, _ = Counter(steps.values()).most_common(1)[0] if steps else (0.0, 0)
    found += [
        f"optimizer step of {n}: {s:g}, others are at {updates:g}" for n, s in steps.items() if s != updates
    ]
    if found or not updates.is_integer() or updates < 0:
        problems += found or [f"optimizer step {updates} is not a count"]
        problems.append("the optimizer does not fit; optimizer=False (--no-optimizer) leaves it out")
        return None
    if updates != step:
        notes.append(f"the optimizer has made {updates:g} updates, the file is of step {step}")
    m, v = here(table, parts["exp_avg"]), here(table, parts["exp_avg_sq"])
    return Moments(m, v, int(updates))


def _entries(state: Any, weights: Mapping[str, Lazy], problems: list[str]) -> dict[str, Mapping[str, Any]]:
    """AdamW's entries by parameter name; {} before its first step."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    values = state.get("state") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or not isinstance(values, Mapping):
        problems.append("optimizer: not the state dict of an optimizer, with state and param_groups")
        return {}
    if not values:
        return {}
    params = [g.get("params") if isinstance(g, Mapping) else None for g in groups]
    names = decay_groups(weights) if len(groups) == 2 else [list(weights)]
    sizes = [len(p) if isinstance(p, list) else 0 for p in params]
    if sizes != [len(group) for group in names]:
        wanted = [len(group) for group in decay_groups(weights)]
        problems.append(
            f"optimizer: groups of {sizes} parameters, expected {wanted} (matrices, vectors) or [{len(weights)}]"
        )
        return {}
    indices = [index for group in params for index in group or ()]
    if not all(type(index) is int for index in indices) or len(set(indices)) < len(indices):
        problems.append("optimizer: the groups' parameters must be distinct numbers")
        return {}
    paired = dict(zip((name for group in names for name in group), indices, strict=True))
    entries = {}
    for name, index in paired.items():
        entry = values.get(index)
        if isinstance(entry, Mapping):
            entries[name] = entry
        else:
            problems.append(f"optimizer state of {name}: missing (index {index!r})")
    problems += [f"optimizer state {i!r}: belongs to no parameter" for i in values if i not in indices]
    return entries


# Writing.


def write(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    *,
    step: int = 0,
    val_loss: float | None = None,
    moments: AnyMoments | None = None,
    optim: OptimConfig = ORIGINAL.optim,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes a checkpoint that gptoss's own code loads, samples from and resumes.

    torch.save lays the file out with empty records, which are then filled through a memory map: no more than a piece of
    a tensor is in memory. Like every file that torch writes without them, its records have no checksums.

    Args:
        path: the file to write; one that is there is overwritten.
        config: the model; of the form of gptoss-original.
        tensors: all parameters, in jaxlm's names and layouts.
        step: optimizer steps done.
        val_loss: validation loss; None is written as NaN.
        moments: AdamW's state in jaxlm's names and layouts, in memory or in files; None: the optimizer starts anew.
        optim: hyperparameters of the optimizer's groups.
        progress: called with the number of bytes written.

    Raises:
        ConversionError: fields that gptoss has no word for, or tensors that do not fit, a line each; or a full disk.
    """
    import torch

    require_form(config)
    table = pairs(config)
    problems = [f"{n}: {t.dtype} is no float" for n, t in tensors.items() if t.dtype not in _FLOATS.values()]
    parts = {"model": tensors}
    if moments is not None:
        parts |= {"exp_avg": _all_lazy(moments.m), "exp_avg_sq": _all_lazy(moments.v)}
    plans: dict[str, dict[str, Planned]] = {}
    for name, part in parts.items():
        found: list[str] = []
        plans[name] = _collected(lambda part=part: there(table, part), found) or {}
        problems += [line if name == "model" else f"{name} of {line}" for line in found]
    if problems:
        raise ConversionError(f"{path}: {len(problems)} tensors cannot be written:\n" + "\n".join(problems))
    names = names_of(config)
    weights = {name: plans["model"][name] for name in names if not BUFFER.fullmatch(name)}
    plans["model"] |= _buffers(config)
    state = {name: _blank(plans["model"][name]) for name in names}
    optimizer = _blank_optimizer(weights, plans, None if moments is None else moments.step, optim)
    loss = math.nan if val_loss is None else float(val_loss)
    content = dict(zip(_KEYS, (step, state, optimizer, loss, cfg_of(config)), strict=True))
    try:
        with torch.serialization.skip_data():
            torch.save(content, path)
        del content, state
        _reserve(path)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        for name in names:
            _fill(mapped["model"][name], plans["model"][name], progress)
        for index, name in enumerate(name for group in decay_groups(weights) for name in group):
            for slot in ("exp_avg", "exp_avg_sq") if moments is not None else ():
                _fill(mapped["optimizer"]["state"][index][slot], plans[slot][name], progress)
            if moments is not None:
                mapped["optimizer"]["state"][index]["step"].fill_(moments.step)
        del mapped
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path}: cannot be written: {error}") from None


def _all_lazy(values: Mapping[str, np.ndarray | Lazy]) -> dict[str, Lazy]:
    return {path: x if isinstance(x, Lazy) else Lazy.of(np.asarray(x)) for path, x in values.items()}


def _buffers(config: ModelConfig) -> dict[str, Planned]:
    """cos_cached and sin_cached of every layer, [C, H] float32: the table twice, side by side."""
    cos, sin = (np.concatenate([x, x], axis=-1).astype(np.float32) for x in rope_table(config))
    return {
        f"layers.{i}.gqa.{name}_cached": Planned.of(Lazy.of(table))
        for i in range(config.n_layers)
        for name, table in (("cos", cos), ("sin", sin))
    }


def _blank(plan: Planned) -> "torch.Tensor":
    """A tensor of a plan's facts; its memory is never touched."""
    import torch

    names = {np.dtype(dtype): name for name, dtype in _FLOATS.items()}
    return torch.empty(plan.shape, dtype=getattr(torch, names[plan.dtype]))


def _blank_optimizer(
    weights: Mapping[str, Planned],
    plans: Mapping[str, Mapping[str, Planned]],
    step: int | None,
    optim: OptimConfig,
) -> dict[str, Any]:
    """AdamW's state dict as torch makes it, its values blank; without moments (`step` None) the state is empty."""
    import torch

    groups = decay_groups(weights)
    decays = (optim.weight_decay, 0.0)
    stand_ins = [{"params": [torch.zeros(1)], "weight_decay": decay} for decay in decays]
    made = torch.optim.AdamW(stand_ins, lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps).state_dict()
    counted = iter(range(len(weights)))
    for group, names in zip(made["param_groups"], groups, strict=True):
        group["params"] = [next(counted) for _ in names]
    if step is not None:
        made["state"] = {
            index: {
                "step": torch.tensor(float(step)),
                "exp_avg": _blank(plans["exp_avg"][name]),
                "exp_avg_sq": _blank(plans["exp_avg_sq"][name]),
            }
            for index, name in enumerate(name for group in groups for name in group)
        }
    return made


def _reserve(path: Path) -> None:
    """Takes the disk space of the whole file: a map of a file with holes dies where a full disk would raise."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _fill(tensor: "torch.Tensor", plan: Planned, progress: Callable[[int], None]) -> None:
    out, start = to_numpy(tensor).reshape(-1), 0
    for piece in plan.pieces():
        out[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
        progress(piece.nbytes)
