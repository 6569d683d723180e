"""What a run says about single parameters: `optim.policy`, lines of REGEX:KEY=VALUE[,KEY=VALUE].

    blocks\\.0\\..*:lr=0.1                     a tenth of the learning rate for the first block
    (embed|lm_head)\\.weight:optimizer=adamw   these by AdamW, whatever optim.optimizer says
    .*_norm\\.weight:decay=1                   norms decay as matrices do

A pattern must match a whole parameter path (`re.fullmatch`). lr multiplies the learning rate; decay replaces the
default, 1 or 0, as the factor on optim.weight_decay. No parameter may match two lines, no line may match nothing.
"""

import difflib
import math
import re
import typing
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from jaxlm.config import ConfigError, OptimConfig, nearest, require

OPTIMIZERS: tuple[str, ...] = typing.get_args(typing.get_type_hints(OptimConfig)["optimizer"])
KEYS = ("lr", "decay", "optimizer")
_FORM = "it must read REGEX:KEY=VALUE[,KEY=VALUE], for example blocks\\.0\\..*:lr=0.1,decay=0"


class Override(NamedTuple):
    """One line of the policy; None leaves a default as it is."""

    line: str  # as it was written
    pattern: str  # of whole parameter paths
    lr: float | None  # factor on the learning rate
    decay: float | None  # factor on the weight decay
    optimizer: str | None


@lru_cache(maxsize=16)
def parse_policy(lines: tuple[str, ...]) -> tuple[Override, ...]:
    """The lines taken apart. Raises ConfigError on what is no such line, an unknown key or a value out of range."""
    return tuple(map(_parse, lines))


def override(lines: tuple[str, ...], path: str) -> Override | None:
    """The line that speaks of a parameter, None without one. Raises ConfigError where two do."""
    found = [line for line in parse_policy(lines) if re.fullmatch(line.pattern, path)]
    require(
        len(found) < 2,
        f"optim.policy: {path} matches {len(found)} lines, {' and '.join(repr(f.line) for f in found[:2])}; "
        "at most one may name a parameter",
    )
    return found[0] if found else None


def check_lines(lines: tuple[str, ...], paths: Iterable[str]) -> None:
    """Raises ConfigError unless every line names some parameter, and no parameter is named twice."""
    known = list(paths)
    for line in parse_policy(lines):
        if not any(re.fullmatch(line.pattern, path) for path in known):
            close = difflib.get_close_matches(line.pattern.replace("\\", ""), known, n=3, cutoff=0.0)
            raise ConfigError(
                f"optim.policy {line.line!r} matches no parameter; the nearest paths are {', '.join(close)}"
            )
    for path in known:
        override(lines, path)


def _parse(line: str) -> Override:
    pattern, colon, settings = line.rpartition(":")
    require(bool(colon and pattern and settings), f"optim.policy {line!r} cannot be read; {_FORM}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"optim.policy {line!r}: {pattern!r} is no regular expression ({error})") from None
    values: dict[str, str] = {}
    for setting in settings.split(","):
        key, equals, value = (part.strip() for part in setting.partition("="))
        require(bool(equals and value), f"optim.policy {line!r}: {setting!r} is not KEY=VALUE; {_FORM}")
        require(
            key in KEYS,
            f"optim.policy {line!r}: unknown key {key!r}{nearest(key, KEYS)}; keys are {', '.join(KEYS)}",
        )
        require(key not in values, f"optim.policy {line!r}: {key} stands twice")
        values[key] = value
    chosen = values.get("optimizer")
    require(
        chosen is None or chosen in OPTIMIZERS,
        f"optim.policy {line!r}: optimizer={chosen!r} must be one of {', '.join(OPTIMIZERS)}"
        f"{nearest(chosen or '', OPTIMIZERS)}",
    )
    return Override(line, pattern, _factor(line, "lr", values), _factor(line, "decay", values), chosen)


def _factor(line: str, key: str, values: dict[str, str]) -> float | None:
    if key not in values:
        return None
    try:
        number = float(values[key])
    except ValueError:
        number = math.nan
    require(
        math.isfinite(number) and number >= 0,
        f"optim.policy {line!r}: {key}={values[key]!r} must be a finite number that is not negative",
    )
    return number
