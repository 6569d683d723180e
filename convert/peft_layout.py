"""Where and how the peft library keeps low-rank factors, derived from the table that pairs the base model's weights.

A linear layer `M` [out, in] has `M.lora_A.weight` [R, in] and `M.lora_B.weight` [out, R]. A stacked parameter `M.p`
[E, out, in] (the experts of transformers 5) has `M.lora_A.weight` [E*R, in], expert-major, and `M.lora_B.weight`
[out, R*E], rank-major: row e*R+r of A belongs to column r*E+e of B. Two adapted parameters of one module are nested:
the one that the module registers first is the inner, `M.base_layer.lora_A.weight`. All names start with PREFIX.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.rules import SAME, TRANSPOSE, Index, Pair
from jaxlm.adapter_config import ADAPTABLE

PREFIX = "base_model.model."
_REGISTERED = ("gate_up_proj", "down_proj")  # in every experts module of transformers 5, in this order

# Fields of adapter_config.json that decide what an adapter computes and that are understood here.
HANDLED = re.compile(
    "peft_type|r|lora_alpha|lora_dropout|use_rslora|target_modules|target_parameters|exclude_modules"
    "|layers_to_transform|layers_pattern|rank_pattern|alpha_pattern|init_lora_weights"
)
# Fields that change nothing about a trained adapter. Any other must be null, false or empty.
INERT = re.compile(
    "task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|megatron_config|megatron_core"
    "|loftq_config|eva_config|corda_config|lora_ga_config|qalora_group_size|runtime_config|ensure_weight_tying"
)
# Initialisations that rewrite the base weights too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Slot:
    """One weight there that can carry an adapter, and how peft is told to give it one."""

    pair: Pair
    as_parameter: bool  # listed in target_parameters, by its full name; otherwise a module of target_modules

    @property
    def module(self) -> str:
        """The module that holds the weight."""
        return self.pair.other.rpartition(".")[0]

    @property
    def target(self) -> str:
        """What peft matches its targets, rank_pattern and alpha_pattern against."""
        return self.pair.other if self.as_parameter else self.module

    @property
    def stacked(self) -> bool:
        """Whether all experts share one tensor there."""
        return len(self.pair.part_shape) == 3

    def factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_A and lora_B there."""
        *experts, width, out = self.pair.part_shape
        rows = rank * (experts[0] if experts else 1)
        return (rows, width), (out, rows)

    def outward(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Our factors of the whole weight -> lora_A, lora_B of this piece."""
        *lead, rows, columns = self.pair.index
        a, b = a[(*lead, rows, slice(None))], b[(*lead, slice(None), columns)]
        if not self.stacked:
            return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        count, width, rank = a.shape
        lora_a = np.swapaxes(a, 1, 2).reshape(count * rank, width)
        lora_b = b.transpose(2, 1, 0).reshape(b.shape[2], rank * count)
        return np.ascontiguousarray(lora_a), np.ascontiguousarray(lora_b)

    def inward(self, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """lora_A, lora_B -> our factors of this piece: [in, R], [R, out], with [E] before them where stacked."""
        if not self.stacked:
            return np.ascontiguousarray(lora_a.T), np.ascontiguousarray(lora_b.T)
        count = self.pair.part_shape[0]
        a = np.swapaxes(lora_a.reshape(count, -1, lora_a.shape[1]), 1, 2)
        b = lora_b.reshape(lora_b.shape[0], -1, count).transpose(2, 1, 0)
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


@dataclass(frozen=True)
class Piece:
    """The factors of a part of a weight of ours, with their rank and alpha there."""

    index: Index
    a: np.ndarray
    b: np.ndarray
    rank: int
    alpha: float

    def scale(self, rslora: bool) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if rslora else self.rank)


def joined(
    shape: tuple[int, ...], pieces: list[Piece], rslora: bool
) -> tuple[np.ndarray, np.ndarray, int, float]:
    """The factors, rank and alpha of a whole weight, exactly equal to those of its parts side by side."""
    if len(pieces) == 1 and pieces[0].a.shape[:-1] == shape[:-1] and pieces[0].b.shape[-1] == shape[-1]:
        return pieces[0].a, pieces[0].b, pieces[0].rank, pieces[0].alpha
    scale = pieces[0].scale(rslora)
    columns: list[list[tuple[slice, np.ndarray, np.ndarray]]] = [[] for _ in range(shape[0])]
    for piece in pieces:
        b = piece.b
        if piece.scale(rslora) != scale:
            b = (b.astype(np.float64) * (piece.scale(rslora) / scale)).astype(b.dtype)
        for e in range(shape[0]) if isinstance(piece.index[0], slice) else [piece.index[0]]:
            one = (piece.a[e], b[e]) if piece.a.ndim == 3 else (piece.a, b)
            columns[e].append((piece.index[-1], *one))  # type: ignore[arg-type]
    blocks = [_blocks(group) for group in columns]
    rank = max(sum(a.shape[-1] for a, _ in group) for group in blocks)
    a = np.zeros((shape[0], shape[1], rank), np.result_type(*(p.a.dtype for p in pieces)))
    b = np.zeros((shape[0], rank, shape[2]), np.result_type(*(p.b.dtype for p in pieces)))
    for e, group in enumerate(blocks):
        start = 0
        for part, outs in group:
            stop = start + part.shape[-1]
            a[e, :, start:stop] = part
            for where, values in outs:
                b[e, start:stop, where] = values
            start = stop
    first = pieces[0]
    grown = rank / first.rank
    return a, b, rank, first.alpha * (math.sqrt(grown) if rslora else grown)


def _blocks(
    columns: list[tuple[slice, np.ndarray, np.ndarray]],
) -> list[tuple[np.ndarray, list[tuple[slice, np.ndarray]]]]:
    """The parts of one expert; those with the same lora_A share it."""
    groups: list[tuple[np.ndarray, list[tuple[slice, np.ndarray]]]] = []
    for where, a, b in columns:
        for shared, outs in groups:
            if np.array_equal(shared, a):
                outs.append((where, b))
                break
        else:
            groups.append((a, [(where, b)]))
    return groups


def slots(pairs: Iterable[Pair]) -> list[Slot]:
    """The weights of a base model that can carry an adapter.

    Beside stacked experts, whatever else stands in an MLP (router, shared expert, dense layers between mixtures) is
    targeted as a parameter too: peft under transformers 5 takes the names of such modules in target_modules for those
    of the experts of transformers 4, and would not find them.
    """
    usable = [p for p in pairs if ADAPTABLE.fullmatch(p.path) and p.transform in (SAME, TRANSPOSE)]
    stacks = any(len(pair.part_shape) == 3 for pair in usable)
    return [Slot(pair, stacks and bool(re.search(r"\.(moe|mlp)\.", pair.path))) for pair in usable]


def carriers(adapted: Iterable[Slot]) -> list[tuple[Slot, str]]:
    """Each adapted weight, and the name of its factors there: `<name>.lora_A.weight` and `<name>.lora_B.weight`."""
    nested: dict[str, list[Slot]] = {}
    for slot in adapted:
        nested.setdefault(slot.module, []).append(slot)
    result = []
    for module, group in nested.items():
        group.sort(key=lambda slot: _depth(slot.pair.other.rpartition(".")[2]))
        result += [(slot, PREFIX + module + ".base_layer" * i) for i, slot in enumerate(group)]
    return result


def _depth(parameter: str) -> int:
    return -_REGISTERED.index(parameter) if parameter in _REGISTERED else 0


def grouped(chosen: Collection[str], table: Collection[str], common: Callable[[str], str]) -> list[str]:
    """Names that stand for all of `chosen` and for nothing else of `table`.

    `common(name)` is what similar names share. It stands for them where all that share it are chosen; other names stand
    for themselves.
    """
    members: dict[str, set[str]] = {}
    for name in table:
        members.setdefault(common(name), set()).add(name)
    chosen = dict.fromkeys(chosen)
    whole = {key for key, names in members.items() if names <= chosen.keys()}
    return list(dict.fromkeys(common(name) if common(name) in whole else name for name in chosen))


def short(target: str) -> str:
    """The end of a name that a kind of weight shares over layers: `q_proj`, `w1`, `mlp.experts.gate_up_proj`."""
    if re.search(r"\.(experts\.[a-z_]+|weight)$", target):  # a parameter: a shared last word says too little
        return re.sub(r".*\.\d+\.", "", target)
    return target.rpartition(".")[2]


def targets(adapted: Collection[Slot], table: Collection[Slot]) -> dict[str, list[str]]:
    """target_modules and target_parameters that name the adapted weights and no others of the table."""
    lists = {}
    for field, kind in (("target_modules", False), ("target_parameters", True)):
        mine = [slot.target for slot in adapted if slot.as_parameter is kind]
        lists[field] = sorted(grouped(mine, [s.target for s in table if s.as_parameter is kind], short))
    return lists


def patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """rank_pattern or alpha_pattern from the value of each target, for those that differ from the default."""
    result = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            chosen = [target for target, mine in values.items() if mine == value]
            result |= {re.escape(name): value for name in grouped(chosen, values, short)}
    return result


def looked_up(patterns: dict[str, Any], key: str, default: Any) -> Any:
    """The value that rank_pattern or alpha_pattern gives a weight: the first that matches the end of its key."""
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)


class Targets:
    """What an adapter_config.json says about which weights are adapted, as peft understands it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.modules = _names(fields.get("target_modules"))
        self.parameters = frozenset(fields.get("target_parameters") or ())
        self.excluded = _names(fields.get("exclude_modules"))
        layers = fields.get("layers_to_transform")
        self.layers = {layers} if isinstance(layers, int) else set(layers or ())
        patterns = fields.get("layers_pattern") or r"[^.]*"
        self.layer_patterns = [patterns] if isinstance(patterns, str) else patterns

    def key(self, slot: Slot) -> str | None:
        """What rank_pattern and alpha_pattern are matched against for this weight; None where it is not adapted."""
        if _endings(slot.pair.other) & self.parameters:
            return slot.pair.other
        return slot.module if not slot.stacked and self._names_module(slot) else None

    def unmatched(self, table: Collection[Slot]) -> list[str]:
        """Listed targets that no weight of the table answers to, a line each."""
        lists: dict[str, tuple[frozenset[str], list[str]]]
        lists = {"target_parameters": (self.parameters, [slot.pair.other for slot in table])}
        if not isinstance(self.modules, str):
            lists["target_modules"] = self.modules, [slot.module for slot in table]
        return [
            f"{field}: {name!r} names no weight of this model that can carry an adapter"
            for field, (wanted, owned) in lists.items()
            for name in sorted(wanted - {end for one in owned for end in _endings(one)})
        ]

    def _names_module(self, slot: Slot) -> bool:
        module = slot.module
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, module):
                return False
        elif _endings(module) & self.excluded:
            return False
        if isinstance(self.modules, str):
            if self.modules.lower() == "all-linear":  # all but the head
                return slot.pair.path != "lm_head.weight"
            return re.fullmatch(self.modules, module) is not None
        return module in self.modules or (bool(_endings(module) & self.modules) and self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        for pattern in self.layer_patterns:
            if match := re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module):
                return not self.layers or int(match["layer"]) in self.layers
        return not self.layers


def _names(value: Any) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value or ())


def _endings(name: str) -> frozenset[str]:
    """A dotted name and what is left of it when words are taken off its front."""
    words = name.split(".")
    return frozenset(".".join(words[i:]) for i in range(len(words)))


def refusals(fields: dict[str, Any]) -> list[str]:
    """Every field of adapter_config.json that an adapter here cannot express, a line each with its value."""
    kind = fields.get("peft_type")
    lines = [] if kind == "LORA" else [f"peft_type={kind!r}: only 'LORA' adapters can be read"]
    lines += [
        f"{name}={value!r}: not supported"
        for name, value in fields.items()
        if value
        and (name, value) != ("bias", "none")
        and not (HANDLED.fullmatch(name) or INERT.fullmatch(name))
    ]
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        lines.append(
            f"init_lora_weights={start!r}: changes the base weights too; save it with peft's"
            " path_initial_model_for_weight_conversion to get a plain adapter"
        )
    return lines + _mistyped(fields)


def _mistyped(fields: dict[str, Any]) -> list[str]:
    """Fields whose value is of a wrong type, or a regular expression that is none."""
    strings = ("target_modules", "exclude_modules", "layers_pattern")
    lines, expressions = [], [(name, fields[name]) for name in strings if isinstance(fields.get(name), str)]
    for name in (*strings, "target_parameters"):
        value = fields.get(name)
        fits = value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
        if not fits and not (isinstance(value, str) and name in strings):
            lines.append(f"{name}={value!r}: must be a list of names")
        elif name == "layers_pattern" and isinstance(value, list):
            expressions += [(name, pattern) for pattern in value]
    chosen = fields.get("layers_to_transform")
    if chosen is not None and not (_whole(chosen) or (isinstance(chosen, list) and all(map(_whole, chosen)))):
        lines.append(f"layers_to_transform={chosen!r}: must be layer numbers")
    for name in ("rank_pattern", "alpha_pattern"):
        value = fields.get(name) or {}
        if not isinstance(value, dict):
            lines.append(f"{name}={value!r}: must be an object of patterns and numbers")
            continue
        expressions += [(name, key) for key in value]
        good = _whole if name == "rank_pattern" else _number
        lines += [
            f"{name}[{k!r}]={v!r}: must be a positive number"
            for k, v in value.items()
            if not (good(v) and 0 < v < math.inf)
        ]
    lines += [
        f"{name}: {text!r} is no regular expression" for name, text in expressions if not _compiles(text)
    ]
    if not fields.get("target_modules") and not fields.get("target_parameters"):
        lines.append(
            "target_modules and target_parameters are both empty: which weights are adapted is not said"
        )
    return lines


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
