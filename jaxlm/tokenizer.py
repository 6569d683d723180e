"""Byte-level BPE: trained by `tokenizers`, kept as one `tokenizer.json`, encoded by `tiktoken`.

Both libraries give the same ids for a file written here. What makes that so: token ids are merge ranks; the merge that
makes a token is the one by which tiktoken itself would make it; `ignore_merges` states tiktoken's rule that a piece
which is a token is never split; and the pre-tokenisation regex uses only syntax that both regex engines read alike.

Scheme: Sennrich et al. 2016 (BPE), Radford et al. 2019 (bytes as the alphabet).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from jaxlm.config import InputError, nearest

NAMED = ("gpt2", "cl100k_base", "o200k_base")
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_END_OF_TEXT = "<|endoftext|>"  # how the published encodings name their only separator
_UNUSED = "<|unused_{}|>"

# Alternatives in the manner of GPT-4: contractions; a word with one leading non-letter; up to three digits; punctuation
# with the line ends after it; white space up to the last line end; all of it but the last character; the rest. The same
# splitting as Llama 3's, so that a tokenizer trained here can also be expressed where only named patterns are known.
PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]++|\s+(?!\S)|\s++"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"

_SEGMENT = 1 << 19  # characters given to the regex engine at once
_LONGEST_SPACE = 500_000  # the regex engine's backtracking stack overflows at a million


class TokenizerError(InputError):
    """A tokenizer that cannot be made, read or used as asked; the message is one line."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte, as {character: byte}."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_TO_BYTE = _byte_alphabet()
_TO_CHAR = {byte: char for char, byte in _TO_BYTE.items()}


def _spelled(token: bytes) -> str:
    return "".join(_TO_CHAR[b] for b in token)


def _portable(pattern: str) -> str:
    """The same regex in the syntax that Oniguruma (tokenizers) and fancy-regex (tiktoken) read alike.

    `$` is the end of a line to the first and of the text to the second; `{1,3}+` repeats in the first and is
    possessive in the second, where giving back can never help since any shorter match is also a full token.
    """
    return pattern.replace(r"\s++$", r"\s++\z").replace("{1,3}+", "{1,3}")


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """`token` as BPE leaves it when only tokens of lower rank than its own exist."""
    parts = [bytes([b]) for b in token]
    own = ranks[token]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, own), i) for i, (left, right) in enumerate(zip(parts, parts[1:]))]
        rank, i = min(pairs)
        if rank >= own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def segments(text: str, size: int = _SEGMENT) -> Iterator[str]:
    """`text` cut where every supported pattern cuts anyway, so that encoding piece by piece gives the same ids.

    A letter or digit followed by white space always ends a piece. Without such a place past `size` characters the
    rest stays whole.
    """
    start = 0
    while len(text) - start > size:
        cut = _SAFE_CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


_SAFE_CUT = re.compile(r"[^\W_](?=\s)")


class Tokenizer:
    """Text to ids and back.

    Ids count up from 0: first the 256 bytes and the merged tokens in the order of merging, then the special tokens.
    Ids of `vocab_size` that nothing claims become special tokens `<|unused_0|>`, `<|unused_1|>`, ...

    Args:
        pattern: regex whose matches are encoded one by one.
        ranks: {token: id}; the id is also the order of merging.
        specials: {text: id} of tokens that no ordinary text encodes to.
        vocab_size: number of ids; None = one more than the highest.

    Raises:
        TokenizerError: two tokens share an id, a byte has none, or ids lie outside the vocabulary.
    """

    def __init__(
        self, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], vocab_size: int | None = None
    ) -> None:
        ids = [*ranks.values(), *specials.values()]
        taken = set(ids)
        size = max(taken, default=-1) + 1 if vocab_size is None else vocab_size
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise TokenizerError(
                f"the vocabulary has no token for byte {missing[0]}; byte-level BPE needs all 256"
            )
        if len(taken) < len(ids):
            raise TokenizerError(f"{len(ids)} tokens share {len(taken)} ids; each needs its own")
        if min(taken) < 0 or max(taken) >= size:
            raise TokenizerError(f"token ids run from {min(taken)} to {max(taken)}, outside 0 to {size - 1}")
        gaps = (i for i in range(size) if i not in taken)
        names = (name for n in range(size) if (name := _UNUSED.format(n)) not in specials)
        self._pattern, self._ranks = _portable(pattern), ranks
        self._specials = dict(
            sorted({**specials, **dict(zip(names, gaps))}.items(), key=lambda item: item[1])
        )
        self._encoding = tiktoken.Encoding(
            "jaxlm", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.vocab_size = size
        self.n_unused = sum(re.fullmatch(r"<\|unused_\d+\|>", name) is not None for name in self._specials)
        end = self._specials.get(_END_OF_TEXT)
        self.bos_id: int | None = self._specials.get("<|bos|>")
        self.eos_id: int | None = self._specials.get("<|eos|>", end)
        self.pad_id: int | None = self._specials.get("<|pad|>")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from `texts`; pairs seen once are not merged.

        The result has exactly `vocab_size` ids; `n_unused` of them stand for nothing when the texts are too few.

        Raises:
            TokenizerError: `vocab_size` is below the 256 bytes and the special tokens.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size={vocab_size} is below {smallest}, the 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            )
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Trainable

        trainable = Trainable(models.BPE())
        trainable.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(_TO_BYTE),
        )
        trainable.train_from_iterator((piece for text in texts for piece in segments(text)), trainer)
        ranks = {bytes(_TO_BYTE[c] for c in token): i for token, i in trainable.get_vocab().items()}
        specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(PATTERN, ranks, specials, vocab_size)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a byte-level BPE `tokenizer.json`.

        Raises:
            TokenizerError: the file is missing, damaged, or describes something that tiktoken cannot encode alike.
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
            return cls(*_from_json(facts))
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer file {path}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TokenizerError(
                f"tokenizer file {path} is damaged, not a tokenizer.json: {type(error).__name__} {error}"
            ) from None

    @classmethod
    def named(cls, name: str) -> "Tokenizer":
        """A published encoding: gpt2, cl100k_base or o200k_base, from tiktoken's cache or the network.

        Raises:
            TokenizerError: the name is unknown, or the file is neither cached nor reachable.
        """
        if name not in NAMED:
            raise TokenizerError(
                f"unknown tokenizer {name!r}{nearest(name, NAMED)}; known are {', '.join(NAMED)}"
            )
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ImportError, ValueError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise TokenizerError(
                f"tokenizer {name!r} could not be fetched ({reason}); without network, set TIKTOKEN_CACHE_DIR to a "
                "folder that tiktoken filled on another machine, or use tokenizer 'train'"
            ) from None
        return cls(encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)

    def save(self, path: str | Path) -> None:
        """Writes `path` as a tokenizer.json that `tokenizers.Tokenizer.from_file` opens; atomic."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(
                json.dumps(self._to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; with `special`, texts of special tokens become those tokens instead of ordinary text.

        Raises:
            TokenizerError: the text holds a run of white space too long for the regex engine.
        """
        _check_spaces(text)
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, without special tokens, in parallel; same errors."""
        for text in texts:
            _check_spaces(text)
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, special tokens spelled out. Raises TokenizerError on an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, [V] int32; special tokens stand for none."""
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[list(self._ranks.values())] = [len(token) for token in self._ranks]
        return lengths

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that `ids` stand for."""
        return int(self.byte_lengths()[np.asarray(ids, np.int64)].sum())

    def special_id(self, text: str) -> int:
        """Id of the special token `text`. Raises TokenizerError, naming the nearest."""
        if text not in self._specials:
            raise TokenizerError(
                f"the tokenizer has no special token {text!r}{nearest(text, self._specials)}"
            )
        return self._specials[text]

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids: pattern, tokens with their ids, special tokens with theirs."""
        digest = hashlib.sha256(json.dumps([self._pattern, self._specials, self.vocab_size]).encode())
        for token, i in sorted(self._ranks.items(), key=lambda item: item[1]):
            digest.update(f"{i}:{len(token)}:".encode() + token)
        return digest.hexdigest()

    def _to_json(self) -> dict[str, Any]:
        ordered = sorted(self._ranks, key=self._ranks.__getitem__)
        split = [parts for t in ordered if len(t) > 1 and len(parts := _parts(t, self._ranks)) == 2]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        regex = {
            "type": "Split",
            "pattern": {"Regex": self._pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": text, **flags} for text, i in self._specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [regex, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {_spelled(token): self._ranks[token] for token in ordered},
                "merges": [[_spelled(left), _spelled(right)] for left, right in split],
            },
        }


def open_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` means: a name of NAMED, a tokenizer.json, or a directory that holds one.

    Raises:
        TokenizerError: it is none of these, or cannot be read.
    """
    if spec in NAMED:
        return Tokenizer.named(spec)
    path = Path(spec)
    if path.is_dir():
        return Tokenizer.load(path / "tokenizer.json")
    if path.is_file():
        return Tokenizer.load(path)
    raise TokenizerError(
        f"tokenizer {spec!r} is neither a file nor one of {', '.join(NAMED)}{nearest(spec, NAMED)}"
    )


def _check_spaces(text: str) -> None:
    if len(text) <= _LONGEST_SPACE:
        return
    longest = max((m.end() - m.start() for m in re.finditer(r"\s+", text)), default=0)
    if longest > _LONGEST_SPACE:
        raise TokenizerError(
            f"the text holds {longest:,} white space characters in a row; at most {_LONGEST_SPACE:,} can be encoded"
        )


def _from_json(facts: dict[str, Any]) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """(pattern, ranks, specials) of a parsed tokenizer.json; TokenizerError where tiktoken would encode otherwise."""
    model = facts["model"]
    if model.get("type", "BPE") != "BPE" or facts.get("normalizer") is not None:
        kind, normalizer = model.get("type"), (facts.get("normalizer") or {}).get("type")
        raise TokenizerError(
            f"model {kind} with normalizer {normalizer} is not supported; only byte-level BPE without one"
        )
    pattern = _pattern_of(facts["pre_tokenizer"])
    specials = {t["content"]: t["id"] for t in facts["added_tokens"]}
    ranks: dict[bytes, int] = {}
    for token, i in model["vocab"].items():
        if specials.get(token) == i:
            continue
        unknown = [c for c in token if c not in _TO_BYTE]
        if unknown:
            raise TokenizerError(
                f"token {token!r} holds {unknown[0]!r}, which stands for no byte; is it byte-level?"
            )
        ranks[bytes(_TO_BYTE[c] for c in token)] = i
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [model["vocab"][left + right] for left, right in merges]
    if any(a > b for a, b in zip(made, made[1:])):  # a token may stand there by several of its splits
        raise TokenizerError(
            "ids of merged tokens do not follow the order of the merges; tiktoken needs that they do"
        )
    return pattern, ranks, specials


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str:
    stages = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    last = stages[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if len(stages) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        split = stages[0]
        if len(stages) == 2 and not last.get("use_regex", True) and split["type"] == "Split":
            if split["behavior"] == "Isolated" and not split["invert"]:
                return str(split["pattern"]["Regex"])
    raise TokenizerError(
        "the pre-tokenizer is not a regex split followed by bytes "
        f"({', '.join(stage['type'] for stage in stages)}), which is all that is supported"
    )
