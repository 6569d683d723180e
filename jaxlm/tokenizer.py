"""Tokenizers: text to ids and back, whatever the kind; no jax, no torch.

    tokenizer = open_tokenizer("runs/a")          # a tokenizer.json, a folder that holds one, a name, a .tiktoken file
    tokenizer = Tokenizer.train(texts, 64_000)    # byte-level BPE; kind="tfm" is NFD, Metaspace and Punctuation

A tokenizer is kept as one `tokenizer.json` that the `tokenizers` library opens with the same ids. The chat template
that belongs to it stands beside it, in `chat_template.jinja`, where transformers looks for it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import nearest
from jaxlm.disk import replace_text
from jaxlm.tokenizer_base import SPECIAL_TOKENS, UNUSED, Codec, TokenizerError, segments
from jaxlm.tokenizer_bytes import GPT2_PATTERN, PATTERN, ByteLevel
from jaxlm.tokenizer_metaspace import Metaspace, is_metaspace
from jaxlm.tokenizer_named import END_OF_TEXT, NAMED, from_cache, from_file

__all__ = [
    "GPT2_PATTERN",
    "KINDS",
    "NAMED",
    "PATTERN",
    "SPECIAL_TOKENS",
    "Tokenizer",
    "TokenizerError",
    "open_tokenizer",
    "segments",
    "template_file",
]

LARGEST = 1 << 20  # ids; the trainer allocates for all that are asked for before it reads
KINDS = ("gpt4", "tfm")  # byte-level BPE that splits as GPT-4 does; NFD, Metaspace and Punctuation


class Tokenizer:
    """Text to ids and back.

    Made from its arguments it is byte-level BPE (`jaxlm.tokenizer_bytes.ByteLevel`, which explains them); `train`,
    `load`, `named` and `of` make every kind.

    Attributes:
        codec: the definition.
        vocab_size: number of ids, V.
        n_unused: how many of them stand for nothing.
        bos_id, eos_id, pad_id: of `<|bos|>`, of `<|eos|>` or `<|endoftext|>`, of `<|pad|>`; None where there is none.
        chat_template: Jinja, None where none was stored.

    Raises:
        TokenizerError: two tokens share an id, a byte has none, or ids lie outside the vocabulary.
    """

    def __init__(
        self, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], vocab_size: int | None = None
    ) -> None:
        self._hold(ByteLevel(pattern, ranks, specials, vocab_size), None)

    def _hold(self, codec: Codec, chat_template: str | None) -> None:
        self.codec, self.chat_template = codec, chat_template
        self.vocab_size = codec.vocab_size
        self.n_unused = sum(UNUSED.fullmatch(name) is not None for name in codec.specials)
        self.bos_id: int | None = codec.specials.get("<|bos|>")
        self.eos_id: int | None = codec.specials.get("<|eos|>", codec.specials.get(END_OF_TEXT))
        self.pad_id: int | None = codec.specials.get("<|pad|>")

    @classmethod
    def of(cls, codec: Codec, chat_template: str | None = None) -> "Tokenizer":
        """A tokenizer by a definition of any kind."""
        made = cls.__new__(cls)
        made._hold(codec, chat_template)
        return made

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        kind: str = "gpt4",
        specials: Sequence[str] = SPECIAL_TOKENS,
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Learns from `texts`; pairs seen once are not merged. The same texts make the same tokenizer.

        The result has exactly `vocab_size` ids; `n_unused` of them stand for nothing when the texts are too few.

        Args:
            kind: gpt4, or tfm, which reads the texts twice (an iterator is kept in memory).
            specials: texts of the special tokens, in the order of their ids.

        Raises:
            TokenizerError: the kind is unknown, `vocab_size` is below the 256 bytes and the special tokens or above
                LARGEST, or two of those tokens are the same.
        """
        if kind not in KINDS:
            raise TokenizerError(
                f"unknown kind of tokenizer {kind!r}{nearest(kind, KINDS)}; known are {', '.join(KINDS)}"
            )
        twice = [text for n, text in enumerate(specials) if not text or text in specials[:n]]
        if twice:
            raise TokenizerError(f"special token {twice[0]!r} is empty or stands twice")
        if vocab_size > LARGEST:
            raise TokenizerError(
                f"vocab_size={vocab_size} is above {LARGEST:,}, the most that is trained here"
            )
        trained = (ByteLevel if kind == "gpt4" else Metaspace).train(texts, vocab_size, specials)
        return cls.of(trained, chat_template)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, byte-level BPE or Metaspace, and the chat template beside it.

        Raises:
            TokenizerError: a file is missing or damaged, or describes something that would be encoded otherwise.
        """
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TokenizerError(f"tokenizer file {path} does not exist") from None
        except OSError as error:
            raise TokenizerError(f"tokenizer file {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TokenizerError(f"tokenizer file {path} is damaged, not JSON: {error}") from None
        try:
            codec = Metaspace(facts) if is_metaspace(facts) else ByteLevel.from_json(facts)
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer file {path}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TokenizerError(
                f"tokenizer file {path} is damaged, not a tokenizer.json: {type(error).__name__} {error}"
            ) from None
        return cls.of(codec, _stored_template(template_file(path)))

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """A published encoding: gpt2, cl100k_base or o200k_base, from tiktoken's cache or the network.

        Raises:
            TokenizerError: the name is unknown, or the file is neither cached nor reachable.
        """
        return cls.of(from_cache(name))

    def save(self, path: str | Path) -> None:
        """Writes `path` as a tokenizer.json that `tokenizers.Tokenizer.from_file` opens, atomically.

        A chat template is written beside it, as `template_file` names it.
        """
        path = Path(path)
        if self.chat_template is not None:
            replace_text(template_file(path), self.chat_template)
        replace_text(path, json.dumps(self._to_json(), ensure_ascii=False, indent=1) + "\n")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, texts of special tokens become those tokens instead of ordinary text.

        Raises:
            TokenizerError: the text holds a run of white space too long for the regex engine.
        """
        return self.codec.encode(text, special)

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, without special tokens, in parallel; same errors."""
        return self.codec.encode_batch(texts, threads)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids` one after the other, special tokens spelled out.

        They hold the space that Metaspace puts in front of a text: what continues a text needs it.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        return self.codec.decode_bytes(self._checked(ids))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes`."""
        return self.codec.decode(self._checked(ids))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return ids

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, [V] int32; special tokens stand for none."""
        return self.codec.byte_lengths()

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that `ids` stand for."""
        return int(self.byte_lengths()[np.asarray(ids, np.int64)].sum())

    @property
    def specials(self) -> dict[str, int]:
        """{text: id} of the special tokens, in the order of their ids; not to be changed."""
        return self.codec.specials

    def special_id(self, text: str) -> int:
        """Id of the special token `text`. Raises TokenizerError, naming the nearest."""
        if text not in self.specials:
            raise TokenizerError(f"the tokenizer has no special token {text!r}{nearest(text, self.specials)}")
        return self.specials[text]

    @property
    def loss_note(self) -> str | None:
        """Which texts do not come back as they were, one line; None where every text does."""
        return self.codec.loss_note

    @property
    def lossless(self) -> bool:
        """Whether `decode(encode(text))` is `text` for every text."""
        return self.loss_note is None

    def losses(self, text: str) -> str | None:
        """The first difference between `text` and `decode(encode(text))`, one line; None where there is none."""
        back = self.decode(self.encode(text))
        if back == text:
            return None
        at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
        gone, came = (_shown(found[at : at + 1]) for found in (text, back))
        return f"character {at:,}: {gone} comes back as {came}"

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids; the chat template is no part of it."""
        return self.codec.fingerprint()

    def _to_json(self) -> dict[str, Any]:
        return self.codec.to_json()


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` means.

    Args:
        spec: a name of NAMED, a tokenizer.json, a directory that holds one, or the .tiktoken file of a published
            encoding.

    Raises:
        TokenizerError: it is none of these, or cannot be read.
    """
    if spec in NAMED:
        return Tokenizer.named(str(spec))
    path = Path(spec)
    if path.suffix == ".tiktoken" and path.is_file():
        return Tokenizer.of(from_file(path))
    if path.is_dir():
        return Tokenizer.load(path / "tokenizer.json")
    if path.is_file():
        return Tokenizer.load(path)
    raise TokenizerError(
        f"tokenizer {str(spec)!r} is neither a file nor one of {', '.join(NAMED)}{nearest(str(spec), NAMED)}"
    )


def template_file(path: str | Path) -> Path:
    """Where the chat template of a tokenizer stands: chat_template.jinja, or beside another NAME.json NAME.jinja."""
    path = Path(path)
    return path.with_name("chat_template.jinja" if path.name == "tokenizer.json" else f"{path.stem}.jinja")


def _stored_template(path: Path) -> str | None:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TokenizerError(f"chat template {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"chat template {path} is not UTF-8: {error.reason}") from None


def _shown(text: str) -> str:
    return f"{text!r} (U+{ord(text):04X})" if text else "nothing"
