"""What every kind of tokenizer is made of: the interface of a codec, and what all kinds share."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import InputError

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
UNUSED = re.compile(r"<\|unused_\d+\|>")  # stands for nothing; fills a vocabulary up to its size

_SEGMENT = 1 << 19  # characters given to a library at once


class TokenizerError(InputError):
    """A tokenizer that cannot be made, read or used as asked; the message is one line."""


class Codec(ABC):
    """Text to ids and back by one definition; `jaxlm.tokenizer.Tokenizer` is what others hold.

    Attributes:
        vocab_size: number of ids, V.
        specials: {text: id} of tokens that no ordinary text encodes to, in the order of their ids.
        loss_note: which texts do not come back as they were, one line; None where every text does.
    """

    vocab_size: int
    specials: dict[str, int]
    loss_note: str | None = None

    @abstractmethod
    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of `text`; with `special`, texts of special tokens become those tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    @abstractmethod
    def decode_bytes(self, ids: list[int]) -> bytes:
        """What each id stands for, one after the other; `ids` are of the vocabulary."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, [V] int32; special tokens stand for none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The contents of a tokenizer.json that the `tokenizers` library opens, with the same ids."""


def with_unused(specials: Mapping[str, int], taken: set[int], size: int) -> dict[str, int]:
    """`specials` and `<|unused_0|>`, … for the ids below `size` that are not `taken`, in the order of ids."""
    gaps = (i for i in range(size) if i not in taken)
    names = (name for n in range(size) if (name := f"<|unused_{n}|>") not in specials)
    return dict(sorted({**specials, **dict(zip(names, gaps))}.items(), key=lambda item: item[1]))


def added_tokens(specials: Mapping[str, int]) -> list[dict[str, Any]]:
    """Special tokens as a tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": text, **flags} for text, i in specials.items()]


def valid_text(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which is no text; JSON can hold such."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def segments(text: str, size: int = _SEGMENT) -> Iterator[str]:
    """`text` cut where every kind of tokenizer cuts anyway, so that encoding piece by piece gives the same ids.

    Before a space that follows a letter or digit. Without such a place past `size` characters the rest stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = _SAFE_CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


_SAFE_CUT = re.compile(r"[^\W_](?= )")
