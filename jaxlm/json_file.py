"""JSON that comes from elsewhere: read strictly, so that what one reader sees is what every other sees.

A key that stands twice, NaN and Infinity, numbers beyond a double and integers of many digits are refused: other
programs read them differently, or not at all.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

_MOST_DIGITS = 30  # of an integer; Python itself stops at 4,300


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one object; a byte-order mark is skipped. Raises OSError, or ValueError in one line."""
    return parse_object(Path(path).read_text(encoding="utf-8-sig"))


def parse_object(text: str) -> dict[str, Any]:
    """A text that holds one object. Raises ValueError in one line, naming keys that stand twice."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    try:
        value = json.loads(
            text, object_pairs_hook=unique, parse_constant=_constant, parse_int=_integer, parse_float=_real
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must hold an object, not {type(value).__name__}")
    if twice:
        raise ValueError(", ".join(f"{key[:80]!r} stands twice" for key in twice[:5]))
    return value


def _constant(text: str) -> float:
    raise ValueError(f"holds {text}, which is not JSON")


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"holds an integer of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text[:40]}, which is beyond a double")
    return value
