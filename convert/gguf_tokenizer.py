"""Byte-level BPE <-> GGUF's `tokenizer.ggml.*` metadata, for the tokenizers whose ids llama.cpp reproduces.

llama.cpp knows splitting patterns by name only and implements each by hand, so a tokenizer can be written if its
pattern is one of those, and special tokens only if no ordinary text can be taken for one. Its tables of letters and
digits are those of Unicode 15.1, tiktoken's of 16: the 4,382 letters and digits that came with Unicode 16.0 (Garay,
Todhri, more hieroglyphs, ...) may be split otherwise. Those are all that differ, of 974,594 code points tried.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_header import Value
from convert.specials import Specials, of_tokenizer
from jaxlm.tokenizer import GPT2_PATTERN, PATTERN, Tokenizer, TokenizerError
from jaxlm.tokenizer_bytes import ByteLevel

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pattern -> llama.cpp's name for it. Llama 3's own spelling takes 's with a long s, U+017F, for a contraction; nothing
# else differs.
NAMES = {PATTERN: "llama-bpe", _LLAMA3: "llama-bpe", GPT2_PATTERN: "gpt-2"}
_PATTERNS = {"llama-bpe": PATTERN, "llama3": PATTERN, "llama-v3": PATTERN, "gpt-2": GPT2_PATTERN}
_WHOLE_PIECES = {"llama-bpe"}  # where a piece that is a token is never split, whatever the merges say
_FROM_PLAIN_TEXT = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}  # by llama.cpp, unasked
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as its file says it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        return json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))


def _pattern(facts: Mapping[str, Any]) -> str:
    return facts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def refused_tokenizer(tokenizer: Tokenizer, vocab_size: int, specials: Specials | None = None) -> list[str]:
    """Why llama.cpp would not give the same ids, one line each; empty where it does."""
    facts, problems = _facts(tokenizer), []
    if not isinstance(tokenizer.codec, ByteLevel):
        return ["tokenizer: it is no byte-level BPE, and llama.cpp has none that decomposes letters (NFD)"]
    if tokenizer.vocab_size > vocab_size:
        problems.append(f"tokenizer: {tokenizer.vocab_size} tokens in a model of vocab_size={vocab_size}")
    pattern, vocab = _pattern(facts), facts["model"]["vocab"]
    pre = NAMES.get(pattern)
    if pre is None:
        hint = " (it keeps white space at the end of a text together)" if r"|\s++\z" in pattern else ""
        problems.append(
            f"tokenizer: llama.cpp has no pre-tokenizer that splits as this pattern does{hint}: {pattern}"
        )
    elif pre not in _WHOLE_PIECES:
        made = {"".join(pair) for pair in facts["model"]["merges"]}
        unmade = [token for token in vocab if len(token) > 1 and token not in made]
        if unmade:
            problems.append(
                f"tokenizer: no merge makes the token {unmade[0]!r}; under {pre} llama.cpp never would"
            )
    if not facts["model"]["merges"]:
        problems.append("tokenizer: it has no merges at all, without which llama.cpp does not load it")
    for text in (token["content"] for token in facts["added_tokens"]):
        if not text or text in vocab or text in _FROM_PLAIN_TEXT:
            problems.append(f"tokenizer: llama.cpp would take ordinary text for the special token {text!r}")
        elif _is_one_piece(text, pattern):
            problems.append(
                f"tokenizer: the ordinary word {text!r} would become the special token of this name"
            )
    specials = specials or of_tokenizer(tokenizer)
    if not specials.eos:
        problems.append("tokenizer: no token is said to end a text, for which llama.cpp would take token 11")
    named = {"bos": specials.bos, "eos": max(specials.eos, default=None), "pad": specials.pad}
    problems += [
        f"tokenizer: {role}_token_id={i} in a model of vocab_size={vocab_size}"
        for role, i in named.items()
        if i is not None and i >= vocab_size
    ]
    return problems


def _is_one_piece(text: str, pattern: str) -> bool:
    """Whether some ordinary text, spelled in the alphabet of bytes, is this text and is not split by the pattern."""
    from tokenizers import Regex, decoders, pre_tokenizers

    if not set(text) <= set(pre_tokenizers.ByteLevel.alphabet()):
        return False
    plain = decoders.ByteLevel().decode([text])
    return len(pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(plain)) == 1


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int, specials: Specials | None = None
) -> dict[str, bool | int | str | list[Any]]:
    """The keys of a tokenizer that is not refused, padded to the model's vocabulary; None says that there is none."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    facts = _facts(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, i in facts["model"]["vocab"].items():
        tokens[i], types[i] = text, _NORMAL
    for token in facts["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], _CONTROL
    specials = specials or of_tokenizer(tokenizer)
    ids = {
        "bos": specials.eos[0] if specials.bos is None else specials.bos,
        "eos": specials.eos[0],
        "eot": specials.eos[1] if len(specials.eos) > 1 else None,  # llama.cpp stops at this one too
        "padding": specials.pad,
    }
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": NAMES[_pattern(facts)],
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in facts["model"]["merges"]],
        "add_bos_token": specials.adds_bos,
        "add_eos_token": False,
        "add_space_prefix": False,
    } | {f"{what}_token_id": i for what, i in ids.items() if i is not None}
    chat = {} if specials.chat_template is None else {"tokenizer.chat_template": specials.chat_template}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | chat


def read_tokenizer(facts: Mapping[str, Value], vocab_size: int) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a file, or None and why it was left out."""
    model = facts.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None, []
    pre = facts.get("tokenizer.ggml.pre")
    tokens, types = facts.get("tokenizer.ggml.tokens"), facts.get("tokenizer.ggml.token_type")
    merges = facts.get("tokenizer.ggml.merges")
    if model != "gpt2" or pre not in _PATTERNS:
        return None, [
            f"the tokenizer was left out: model {model!r} with pre-tokenizer {pre!r} is not supported"
        ]
    if not (isinstance(tokens, list) and isinstance(merges, list) and isinstance(types, np.ndarray)):
        return None, ["the tokenizer was left out: tokens, token types or merges are missing"]
    if not len(tokens) == len(types) == vocab_size:
        counts = f"{len(tokens)} tokens and {len(types)} types in a model of {vocab_size}"
        return None, [f"the tokenizer was left out: {counts}"]
    try:
        return _loaded(str(_PATTERNS[str(pre)]), tokens, types.tolist(), merges), []
    except TokenizerError as error:
        reason = str(error).partition("tokenizer.json")[2].lstrip(": ") or str(
            error
        )  # without the name of our file
        return None, [f"the tokenizer was left out: {reason}"]


def read_specials(facts: Mapping[str, Value], vocab_size: int) -> Specials | None:
    """What a file says of its special tokens, None where it has no tokenizer."""
    if facts.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None

    def found(role: str) -> int | None:
        value = facts.get(f"tokenizer.ggml.{role}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    eos = tuple(dict.fromkeys(i for i in (found("eos"), found("eot")) if i is not None))
    template = facts.get("tokenizer.chat_template")
    adds = facts.get("tokenizer.ggml.add_bos_token") is True
    return Specials(
        found("bos"), eos, found("padding"), template if isinstance(template, str) else None, adds
    )


def _loaded(pattern: str, tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """Writes the tokenizer's own file and opens it, which is where everything is checked."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    kinds = {_NORMAL: "vocab", _CONTROL: "special", _USER_DEFINED: "special", _UNUSED: "unused"}
    strange = sorted(set(types) - kinds.keys())
    if strange:
        raise TokenizerError(f"tokens of type {strange[0]} are not supported")
    facts = {
        "normalizer": None,
        "added_tokens": [
            {"id": i, "content": text} for i, text in enumerate(tokens) if kinds[types[i]] == "special"
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(tokens) if types[i] == _NORMAL},
            "merges": merges,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(facts), encoding="utf-8")
        return Tokenizer.load(path)
