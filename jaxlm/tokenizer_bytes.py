"""Byte-level BPE: trained by `tokenizers`, kept as one `tokenizer.json`, encoded by `tiktoken`.

Both libraries give the same ids for a file written here. What makes that so: token ids are merge ranks; the merge that
makes a token is the one by which tiktoken itself would make it; `ignore_merges` states tiktoken's rule that a piece
which is a token is never split; and the pre-tokenisation regex uses only syntax that both regex engines read alike.

Scheme: Sennrich et al. 2016 (BPE), Radford et al. 2019 (bytes as the alphabet).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tiktoken

from jaxlm.tokenizer_base import Codec, TokenizerError, added_tokens, segments, valid_text, with_unused

# Alternatives in the manner of GPT-4: contractions; a word with one leading non-letter; up to three digits; punctuation
# with the line ends after it; white space up to the last line end; all of it but the last character; the rest. The same
# splitting as Llama 3's, so that a tokenizer trained here can also be expressed where only named patterns are known.
PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]++|\s+(?!\S)|\s++"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"

_LONGEST_SPACE = 500_000  # the regex engine's backtracking stack overflows at a million


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


class ByteLevel(Codec):
    """Ids count up from 0: first the 256 bytes and the merged tokens in the order of merging, then the special tokens.

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
        self.vocab_size = size
        self.specials = with_unused(specials, taken, size)
        self.pattern, self.ranks = _portable(pattern), ranks
        self._encoding = tiktoken.Encoding(
            "jaxlm", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.specials
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> "ByteLevel":
        """Learns merges from `texts`; pairs seen once are not merged.

        Raises:
            TokenizerError: `vocab_size` is below the 256 bytes and the special tokens.
        """
        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size={vocab_size} is below {smallest}, the 256 bytes and {len(specials)} special tokens"
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
            vocab_size=vocab_size - len(specials),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(_TO_BYTE),
        )
        pieces = (piece for text in texts for piece in segments(valid_text(text)))
        trainable.train_from_iterator(pieces, trainer)
        ranks = {bytes(_TO_BYTE[c] for c in token): i for token, i in trainable.get_vocab().items()}
        return cls(PATTERN, ranks, {token: len(ranks) + i for i, token in enumerate(specials)}, vocab_size)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "ByteLevel":
        """Of a parsed tokenizer.json.

        Raises:
            TokenizerError: it describes something that tiktoken cannot encode alike.
            KeyError, TypeError, AttributeError, ValueError: it is no tokenizer.json.
        """
        return cls(*_from_json(facts))

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`. Raises TokenizerError where white space runs too long for the regex engine."""
        _check_spaces(text)
        if special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """See `encode`."""
        for text in texts:
            _check_spaces(text)
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """See `Codec`."""
        return self._encoding.decode_bytes(ids)

    def byte_lengths(self) -> np.ndarray:
        """See `Codec`."""
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths

    def fingerprint(self) -> str:
        """See `Codec`: pattern, tokens with their ids, special tokens with theirs."""
        digest = hashlib.sha256(json.dumps([self.pattern, self.specials, self.vocab_size]).encode())
        for token, i in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(f"{i}:{len(token)}:".encode() + token)
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """See `Codec`."""
        ordered = sorted(self.ranks, key=self.ranks.__getitem__)
        split = [parts for t in ordered if len(t) > 1 and len(parts := _parts(t, self.ranks)) == 2]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        regex = {
            "type": "Split",
            "pattern": {"Regex": self.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added_tokens(self.specials),
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
                "vocab": {_spelled(token): self.ranks[token] for token in ordered},
                "merges": [[_spelled(left), _spelled(right)] for left, right in split],
            },
        }


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
