"""What an ablation varies: axes as a command line spells them, and the runs that are their full product. No jax here.

    attention=readable,xla,dtype=float32,bfloat16

An item with `=` begins an axis, an item without one is a further value of the axis before. An axis is one of `AXES` or
any field of the run's configuration by its dotted name. The first value of each axis together is the baseline.
"""

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jaxlm.config import ConfigError, Dtype, RunConfig, from_dict, nearest, to_dict

AXES: dict[str, tuple[str, ...]] = {
    "attention": ("readable", "xla", "cudnn", "auto"),  # which of several equal implementations
    "experts": ("loop", "blocks", "batched", "pallas", "auto"),
    "dtype": typing.get_args(Dtype),  # of the computation: train.dtype
    "quant": ("none", "int8", "int4", "nf4"),  # of the trained weights, for evaluation
    "optimizer": ("adamw", "adam"),  # as configured, or with weight decay off
}
ALIASES = {"train.dtype": "dtype"}
# Fields that say which texts are trained on and compared on; all variants share them.
SHARED = ("data.", "model.vocab_size", "train.eval_batches")
# Fields of what an ablation does not do: it writes no checkpoints, logs every step and runs on one device.
WITHOUT_EFFECT = tuple(f"train.{name}" for name in ("log_every", "eval_every", "save_every", "keep", "plots"))
# What stored weights can be looked at under, without any training.
UNTRAINED = ("attention", "experts", "dtype", "quant", "model.")


class Axis(NamedTuple):
    """One thing that varies, or is set for all variants where it has one value."""

    name: str
    values: tuple[Any, ...]


class Variant(NamedTuple):
    """One run of an ablation."""

    settings: dict[str, Any]  # axis -> value, of all axes
    label: str  # its values of the axes that vary: attention=xla dtype=bfloat16
    run: RunConfig
    attention: Literal["auto", "readable", "xla", "cudnn"]
    experts: Literal["auto", "loop", "blocks", "batched", "pallas"]
    quant: Literal["none", "int8", "int4", "nf4"]

    @property
    def training(self) -> str:
        """Equal for variants that train alike, and differ in how the result is looked at."""
        return json.dumps([to_dict(self.run), self.attention, self.experts], sort_keys=True)


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """The axes of some `--vary` options, values in their types.

    Raises ConfigError, one line, on anything that is no axis, no value of it, or stands twice.
    """
    words: dict[str, list[str]] = {}
    for text in texts:
        current: list[str] | None = None
        for item in text.split(","):
            name, equals, value = (part.strip() for part in item.partition("="))
            value = value if equals else name
            if not value:
                raise ConfigError(f"--vary {text!r}: {'a value' if item.strip() else 'an item'} is empty")
            if equals:
                name = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
                if name in words:
                    raise ConfigError(f"--vary: axis {name!r} stands twice")
                current = words[name] = []
            if current is None:
                raise ConfigError(
                    f"--vary {text!r} must begin with AXIS=VALUE, for example attention=readable,xla"
                )
            current.append(value)
    axes = [Axis(name, _values(name, found)) for name, found in words.items()]
    for axis in axes:
        _refuse(axis)
    if all(len(axis.values) == 1 for axis in axes):
        raise ConfigError(
            "--vary: nothing varies; give an axis at least two values, such as dtype=float32,bfloat16"
        )
    return axes


def make_variants(base: RunConfig, axes: Sequence[Axis], largest: int, trains: bool = True) -> list[Variant]:
    """The full product, the baseline first and the last axis fastest.

    largest: variants there may be. trains: whether anything is trained, or stored weights are looked at only.
    Raises ConfigError where there are more, where two are the same, or where the configuration of one cannot be.
    """
    count = math.prod(len(axis.values) for axis in axes)
    if count > largest:
        product = " x ".join(f"{len(axis.values)} {axis.name}" for axis in axes if len(axis.values) > 1)
        raise ConfigError(
            f"--vary makes {count} variants ({product}); vary less, or raise --max-variants {largest}"
        )
    for axis in axes if not trains else ():
        if len(axis.values) > 1 and not axis.name.startswith(UNTRAINED):
            raise ConfigError(f"--vary {axis.name}: needs training, which --steps 0 does not do")
    variants: list[Variant] = []
    seen: dict[tuple[str, str], str] = {}
    for settings in _product(axes):
        variant = _variant(base, axes, settings)
        twin = seen.setdefault((variant.training, variant.quant), variant.label)
        if twin != variant.label:
            raise ConfigError(f"--vary: {twin!r} and {variant.label!r} are the same run")
        variants.append(variant)
    return variants


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _product(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    if not axes:
        yield {}
        return
    for value in axes[0].values:
        for rest in _product(axes[1:]):
            yield {axes[0].name: value} | rest


def _variant(base: RunConfig, axes: Sequence[Axis], settings: dict[str, Any]) -> Variant:
    varying = [axis.name for axis in axes if len(axis.values) > 1]
    label = " ".join(f"{name}={shown(settings[name])}" for name in varying)
    if settings.get("optimizer") == "adam" and "optim.weight_decay" in settings:
        raise ConfigError("--vary: optimizer=adam turns optim.weight_decay off; vary one of the two")
    fields = {name: value for name, value in settings.items() if name not in AXES}
    if "dtype" in settings:
        fields["train.dtype"] = settings["dtype"]
    if settings.get("optimizer") == "adam":
        fields["optim.weight_decay"] = 0.0
    values = to_dict(base)
    for name, value in fields.items():
        *path, last = name.split(".")
        part = values
        for key in path:
            part = part[key]
        part[last] = value
    try:
        run = from_dict(RunConfig, values)
        if run.optim.decay_steps == 0:  # as a run resolves it when it starts
            steps = max(run.train.steps, run.optim.warmup_steps)
            run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, decay_steps=steps))
    except ConfigError as error:
        raise ConfigError(f"--vary {label}: {error}") from None
    attention, experts = settings.get("attention", "auto"), settings.get("experts", "auto")
    _refuse_backends(label, run, attention, "experts" in settings)
    return Variant(settings, label, run, attention, experts, settings.get("quant", "none"))


def _refuse_backends(label: str, run: RunConfig, attention: str, experts: bool) -> None:
    model, why = run.model, ""
    if attention == "cudnn":
        why = f"needs dtype=bfloat16, not {run.train.dtype}" if run.train.dtype != "bfloat16" else why
        why = "has no model.attn_bias_table" if model.attn_bias_table else why
        why = "has no model.dropout" if model.dropout else why
    if why:
        raise ConfigError(f"--vary {label}: attention=cudnn {why}")
    if experts and not model.moe.n_experts:
        raise ConfigError("--vary experts: the model has none; a preset such as quickstart has")


def _refuse(axis: Axis) -> None:
    name, values = axis
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"--vary {name}: {shown(value)} stands twice")
    if name in WITHOUT_EFFECT or name.startswith("mesh."):
        reason = (
            "variants run on one device" if name.startswith("mesh.") else "it has no effect on an ablation"
        )
        raise ConfigError(f"--vary {name}: {reason}")
    if len(values) > 1 and name.startswith(SHARED):
        raise ConfigError(f"--vary {name}: all variants share it; give it one value")


def _values(name: str, words: Sequence[str]) -> tuple[Any, ...]:
    """The values of an axis in the type of its field."""
    if name in AXES:
        return tuple(_choice(name, word, AXES[name]) for word in words)
    fields = _known_fields()
    if name not in fields:
        # `lr` is nearer to optim.lr than its letters say.
        inside = [known for known in fields if known.rpartition(".")[2] == name]
        hint = f" (did you mean {inside[0]!r}?)" if inside else nearest(name, [*AXES, *fields])
        raise ConfigError(
            f"--vary: unknown axis {name!r}{hint}; axes are {', '.join(AXES)}, and fields such as optim.lr"
        )
    return tuple(_value(name, word, fields[name]) for word in words)


@functools.cache
def _known_fields() -> dict[str, Any]:
    return dict(_fields(RunConfig))


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field, those of nested configurations in place of these."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _value(name: str, word: str, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        return _choice(name, word, typing.get_args(hint))
    if hint is bool:
        return _choice(name, word.lower(), ("true", "false")) == "true"
    if hint not in (int, float, str):
        raise ConfigError(f"--vary {name}: it holds a list, and only single values can be varied")
    try:
        value = hint(word)
    except ValueError:
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--vary {name}={word!r} must be {'a whole' if hint is int else 'a finite'} number")
    return value


def _choice(name: str, word: str, known: Sequence[str]) -> str:
    if word not in known:
        raise ConfigError(f"--vary {name}={word!r} must be one of {', '.join(known)}{nearest(word, known)}")
    return word
