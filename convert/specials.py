"""What a model's files say of its special tokens, beside the tokenizer: which ids start, end and pad, and how a
conversation is written. A tokenizer.json alone does not know, and a wrong guess makes a model that never stops.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.chat import Chat, chatml
from jaxlm.json_file import read_object
from jaxlm.tokenizer import Tokenizer, TokenizerError

GENERATION, SETTINGS, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Specials:
    """Special tokens of a model."""

    bos: int | None = None  # starts a text
    eos: tuple[int, ...] = ()  # end an answer; the first is the tokenizer's own
    pad: int | None = None
    chat_template: str | None = None  # Jinja
    adds_bos: bool = False  # whether encoding a text puts bos in front

    def config_ids(self) -> dict[str, Any]:
        """The keys of config.json; an id that is not there is null."""
        return {
            "bos_token_id": self.bos,
            "eos_token_id": self.eos[0] if self.eos else None,
            "pad_token_id": self.pad,
        }

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: all ids that end an answer."""
        ids = {key: value for key, value in self.config_ids().items() if value is not None}
        return ids | ({"eos_token_id": list(self.eos)} if len(self.eos) > 1 else {})


def of_tokenizer(tokenizer: Tokenizer) -> Specials:
    """Of a tokenizer made here: its own names and template; a turn's end ends an answer too."""
    template, end = tokenizer.chat_template, None
    if template is not None:
        end = Chat.of(
            tokenizer, template, bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id
        ).end
        return Specials(tokenizer.bos_id, _ends(tokenizer, end), tokenizer.pad_id, template)
    with contextlib.suppress(TokenizerError):
        tokenizer.special_id("<|im_start|>")
        end = tokenizer.special_id("<|im_end|>")
    template = None if end is None else chatml()
    return Specials(tokenizer.bos_id, _ends(tokenizer, end), tokenizer.pad_id, template)


def _ends(tokenizer: Tokenizer, turn: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_id, turn) if i is not None))


def of_files(raw: Mapping[str, Any] | None, carried: Mapping[str, Path]) -> Specials | None:
    """Of the files of a Hugging Face directory, None where they say nothing.

    raw: config.json. carried: the other files by name. Raises ValueError in one line where one of them is damaged.
    """
    generation, settings = (_object(carried.get(name)) for name in (GENERATION, SETTINGS))
    if not (raw or generation or settings):
        return None

    def stated(key: str) -> Any:
        return next((facts[key] for facts in (generation, raw or {}) if facts.get(key) is not None), None)

    vocabulary = _vocabulary(carried.get("tokenizer.json"))
    found = {}
    for role in ("bos", "eos", "pad"):
        ids = stated(f"{role}_token_id")
        if ids is None:
            ids = vocabulary.get(_text(settings.get(f"{role}_token")))
        found[role] = tuple(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and i >= 0)
    own = vocabulary.get(_text(settings.get("eos_token")))
    ends: list[int] = sorted(found["eos"], key=lambda i: i != own)  # the tokenizer's own first
    eos = tuple(dict.fromkeys(ends))
    bos, pad = (next(iter(found[role]), None) for role in ("bos", "pad"))
    adds = bos is not None and _first_id(carried.get("tokenizer.json")) == bos
    return Specials(
        bos, eos, pad, _template(carried, settings), adds or settings.get("add_bos_token") is True
    )


def _object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _template(carried: Mapping[str, Path], settings: Mapping[str, Any]) -> str | None:
    """The default template: a file of its own, or a key of tokenizer_config.json, alone or first among named ones."""
    if TEMPLATE in carried:
        try:
            return carried[TEMPLATE].read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{carried[TEMPLATE]} is not UTF-8: {error.reason}") from None
    value = settings.get("chat_template", _object(carried.get("chat_template.json")).get("chat_template"))
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _vocabulary(path: Path | None) -> dict[Any, int]:
    """Ids of the tokens that were added to a tokenizer.json, special ones among them."""
    if path is None:
        return {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {
            token["content"]: int(token["id"])
            for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        }
    return {}


def _first_id(path: Path | None) -> int | None:
    """What the tokenizers library puts in front of a text, None where that is nothing."""
    from tokenizers import Tokenizer as Library

    if path is None:
        return None
    try:
        library = Library.from_file(str(path))
    except Exception:  # the library's errors have no class of their own, and whoever opens it will say
        return None
    bare = library.encode("x", add_special_tokens=False).ids
    whole = library.encode("x").ids
    return whole[0] if len(whole) > len(bare) and whole[1 : 1 + len(bare)] == bare else None
