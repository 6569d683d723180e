"""BPE over characters, as the TFM models have it: NFD, then Metaspace and Punctuation; by the `tokenizers` library.

NFD (Unicode Standard Annex 15) takes composed letters apart; Metaspace writes a space as U+2581 and puts one in front
of a text; Punctuation stands alone. Characters beyond the alphabet that was learned become the bytes of their UTF-8,
tokens `<0x00>` to `<0xFF>`, so that nothing is lost but what the definition cannot keep: see `Metaspace.loss_note`.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.tokenizer_base import Codec, TokenizerError, added_tokens, segments, valid_text, with_unused

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MOST_CHARACTERS = 1000  # of the alphabet: rarer ones are spelled in bytes
_STAGES = ("Metaspace", "Punctuation")


class Metaspace(Codec):
    """One tokenizer.json of this kind.

    Ids of a trained one: the 256 bytes, the alphabet and the merged tokens in the order of merging, special tokens.

    Args:
        facts: the parsed file.

    Raises:
        TokenizerError: it holds a normaliser, splitting or model of another kind.
        KeyError, TypeError, AttributeError, ValueError: it is no tokenizer.json.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self._library = _opened(facts)
        self._facts = json.loads(self._library.to_str())  # as the library understood it
        _require_kind(self._facts)
        self._facts["model"]["dropout"] = None  # is for training; encoding would be random
        self._library = _opened(self._facts)
        # Without its special tokens, so that ordinary text finds none.
        self._plain = _opened(self._facts | {"added_tokens": [], "post_processor": None})
        self._prepends = _metaspace(self._facts)["prepend_scheme"] == "always"
        texts = [token["content"] for token in self._facts["added_tokens"]]
        specials = {text: i for text in texts if (i := self._library.token_to_id(text)) is not None}
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.specials = with_unused(specials, set(vocab.values()), self.vocab_size)
        self._pieces = self._spelled(vocab)
        self.loss_note = self._note()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> "Metaspace":
        """Learns an alphabet and merges from `texts`; pairs seen once are not merged.

        Texts are read twice, the first time to count characters; an iterator is kept in memory for that.

        Raises:
            TokenizerError: `vocab_size` is below the 256 bytes, U+2581 and the special tokens.
        """
        smallest = 256 + 1 + len(specials)
        if vocab_size < smallest:
            raise TokenizerError(
                f"vocab_size={vocab_size} is below {smallest}, "
                f"the 256 bytes, {SPACE} and {len(specials)} special tokens"
            )
        from tokenizers import trainers

        texts = list(texts) if iter(texts) is texts else texts
        room = vocab_size - 256 - len(specials)
        trainable = _opened(_file({}, [], {}))
        counts = _characters(texts, trainable)
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[SPACE],
            limit_alphabet=1 + _alphabet(counts, min(_MOST_CHARACTERS, room // 2)),
        )
        pieces = (piece for text in texts for piece in segments(valid_text(text)))
        trainable.train_from_iterator(pieces, trainer)
        model = json.loads(trainable.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        vocab = {token: i for i, token in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *tokens])}
        named = {text: len(vocab) + i for i, text in enumerate(specials)}
        taken = set(range(len(vocab) + len(named)))
        return cls(_file(vocab, model["merges"], with_unused(named, taken, vocab_size)))

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Codec`. Half of a surrogate pair, which is no text, becomes U+FFFD."""
        library = self._library if special else self._plain
        return library.encode(valid_text(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """See `encode`; the library uses as many threads as its variable RAYON_NUM_THREADS says."""
        found = self._plain.encode_batch_fast([valid_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """See `Codec`; the space in front of a text is there."""
        return b"".join(self._pieces[i] for i in ids)

    def decode(self, ids: list[int]) -> str:
        """See `Codec`; the space in front of a text is not there."""
        text = super().decode(ids)
        ordinary = bool(ids) and ids[0] not in self.specials.values()
        return text[1:] if self._prepends and ordinary and text.startswith(" ") else text

    def byte_lengths(self) -> np.ndarray:
        """See `Codec`: bytes of the text in NFD, and one for the space in front of it."""
        lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        lengths[list(self.specials.values())] = 0
        return lengths

    def fingerprint(self) -> str:
        """See `Codec`: normaliser, splitting, tokens with their ids, merges, special tokens."""
        deciding = [self._facts[name] for name in ("normalizer", "pre_tokenizer", "model")]
        facts = json.dumps(["metaspace", deciding, self.specials, self.vocab_size], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """See `Codec`."""
        return self._facts

    def _spelled(self, vocab: dict[str, int]) -> list[bytes]:
        """The bytes of each id."""
        pieces = [b""] * self.vocab_size
        falls_back = self._facts["model"]["byte_fallback"]
        for token, i in vocab.items():
            byte = _BYTE.fullmatch(token) if falls_back else None
            pieces[i] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        for text, i in self.specials.items():
            pieces[i] = text.encode()
        return pieces

    def _note(self) -> str:
        model = self._facts["model"]
        whole = {f"<0x{b:02X}>" for b in range(256)} <= model["vocab"].keys() and model["byte_fallback"]
        unknown = "become " + model["unk_token"] if model["unk_token"] else "are left out"
        losses = [
            "composed letters come back decomposed (NFD)" * (self._facts["normalizer"] is not None),
            "a space in front of a text is lost" * self._prepends,
            "U+2581 becomes a space",
            f"characters that it has not learned {unknown}" * (not whole),
        ]
        return "not every text comes back as it was: " + ", ".join(loss for loss in losses if loss)


def is_metaspace(facts: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is of this kind."""
    return any(stage["type"] == "Metaspace" for stage in _stages(facts))


def _stages(facts: dict[str, Any]) -> list[dict[str, Any]]:
    stage = facts["pre_tokenizer"]
    if stage is None:
        return []
    return stage["pretokenizers"] if stage["type"] == "Sequence" else [stage]


def _metaspace(facts: dict[str, Any]) -> dict[str, Any]:
    return next(stage for stage in _stages(facts) if stage["type"] == "Metaspace")


def _opened(facts: dict[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_str(json.dumps(facts))
    except Exception as error:  # the library's errors have no class of their own
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__)) from None


def _require_kind(facts: dict[str, Any]) -> None:
    model, normalizer, stages = facts["model"], facts["normalizer"], _stages(facts)
    if model["type"] != "BPE" or normalizer not in (None, {"type": "NFD"}):
        kind = "no normalizer" if normalizer is None else f"normalizer {normalizer['type']}"
        raise TokenizerError(
            f"model {model['type']} with {kind} is not supported; with Metaspace only BPE after NFD or nothing"
        )
    names = [stage["type"] for stage in stages]
    if sorted(names) not in (["Metaspace"], list(_STAGES)):
        raise TokenizerError(
            f"the pre-tokenizer is {', '.join(names)}; with Metaspace only Punctuation is supported"
        )
    found = _metaspace(facts)
    if found["replacement"] != SPACE or found["prepend_scheme"] == "first" or not found["split"]:
        raise TokenizerError(
            f"Metaspace with {found['replacement']!r}, prepend_scheme {found['prepend_scheme']} and split "
            f"{str(found['split']).lower()} is not supported; only {SPACE!r}, always or never, and true"
        )
    marked = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model[name]]
    if marked:
        raise TokenizerError(f"{marked[0]} {model[marked[0]]!r} is not supported with Metaspace")


def _file(vocab: dict[str, int], merges: list[list[str]], specials: dict[str, int]) -> dict[str, Any]:
    """The tokenizer.json of what was learned."""
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    punctuation = {"type": "Punctuation", "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(specials),
        "normalizer": {"type": "NFD"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace, punctuation]},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _characters(texts: Iterable[str], trainable: "tokenizers.Tokenizer") -> list[int]:
    """How often each character but the space occurs after the normaliser, the most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text if text.isascii() else trainable.normalizer.normalize_str(valid_text(text)))
    for space in (" ", SPACE):
        counts.pop(space, None)
    return sorted(counts.values(), reverse=True)


def _alphabet(counts: list[int], most: int) -> int:
    """How many characters to keep: `most`, or as many less as share the count of one that is left out.

    Among equals the library would choose as its hash table lies, and no two trainings would be the same.
    """
    if len(counts) <= most:
        return len(counts)
    return len(list(itertools.takewhile(lambda count: count > counts[most], counts)))
