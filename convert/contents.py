"""What a target holds, unread: weights in our names, AdamW's state, and what else its format carries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.specials import Specials
from jaxlm.config import InputError
from jaxlm.tensor_file import Lazy
from jaxlm.tokenizer import Tokenizer


class TargetError(InputError):
    """A path that is no target, or lacks what was asked of it."""


@dataclass(frozen=True)
class Moments:
    """AdamW's state in our names: what a run needs beside the weights to go on."""

    m: Mapping[str, Lazy]  # running mean of the gradients
    v: Mapping[str, Lazy]  # running mean of their squares
    step: int  # updates made, which bias corrections count; skipped ones are none


@dataclass(frozen=True)
class Contents:
    """What a target holds, unread: weights in our names, and what else its format carries."""

    tensors: Mapping[str, Lazy]
    moments: Moments | None = None
    raw: dict[str, Any] | None = None  # Hugging Face's config.json
    carried: Mapping[str, Path] = field(default_factory=dict)  # tokenizer and generation files of that format
    tokenizer: Tokenizer | None = None  # where the format holds one of its own
    specials: Specials | None = None  # likewise
    notes: tuple[str, ...] = ()
    family: str | None = None  # of a Hugging Face directory
