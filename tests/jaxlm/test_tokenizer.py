"""Both BPE libraries agree, bytes survive, files round-trip, damage is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.data.corpus import open_corpus
from jaxlm.tokenizer import (
    GPT2_PATTERN,
    PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerError,
    open_tokenizer,
    segments,
)

TEXTS = [
    "def f(x):\n    return x + 1234567\n\n\n" * 40,
    "The quick brown fox don't I'LL we've aaaaaaa abababab 12 123 1234\t\r\n" * 40,
    "x = _\nfoo_\n" * 40,
    "你好世界 你好 😀😀 ñandú ſtraße <|bos|> <|im_start|>user</think>\n" * 40,
]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\u3000"]
WORDS = [
    "'s",
    "'LL",
    "'ſ",
    "12345",
    "٣",
    "½",
    "你好",
    "😀",
    "é",
    "e\u0301",
    "aaaaaaa",
    "ababab",
    "def ",
    "return",
]
MARKS = ["<|bos|>", "<|bos", "</think>", "<think", "|>", "<|unused_0|>", "...", "__", "!?\n\n"]
ATOMS = st.sampled_from(SPACES + WORDS + MARKS)
TEXT = st.one_of(st.text(), st.lists(st.one_of(ATOMS, st.text(max_size=3)), max_size=30).map("".join))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 512)


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory) -> tokenizers.Tokenizer:
    """The same file, opened by the other library."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return tokenizers.Tokenizer.from_file(str(path))


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example("")
@example("<|bos|><|bos|> x<|unused_0|>")
@example("   \n \n  x  ")
def test_tiktoken_and_tokenizers_give_the_same_ids(tokenizer, other, text):
    """Any text, special tokens taken as text or as tokens; and decoding restores it."""
    other.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == other.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    other.encode_special_tokens = False
    assert tokenizer.encode(text, special=True) == other.encode(text).ids


def test_both_libraries_agree_on_the_standard_library(tmp_path):
    """Real text, a vocabulary that it fills."""
    texts = [d.text for d in open_corpus("", "text")][::40]
    tokenizer = Tokenizer.train(texts, 2048)
    tokenizer.save(tmp_path / "t.json")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    other.encode_special_tokens = True
    assert tokenizer.encode_batch(texts, 2) == [e.ids for e in other.encode_batch(texts)]
    assert tokenizer.n_unused == 0


LLAMA3_PATTERN = (  # as Llama 3's own file has it, its contractions spelled out
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORMER_PATTERN = PATTERN.replace(r"|\s*[\r\n]++|\s+(?!\S)|\s++", r"|\s++\z|\s*[\r\n]|\s+(?!\S)|\s")


@settings(max_examples=200, deadline=None)
@given(TEXT)
@example("a \n  b\n\n  ")
@example(" \r\n \t\n")
@example("x  \u3000\n\x1c ")
def test_the_default_pattern_splits_as_llama3s(text):
    """Piece by piece, so that it has a name wherever patterns are known by name only."""

    def pieces(pattern):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    assert pieces(PATTERN) == pieces(LLAMA3_PATTERN)


def test_files_with_the_former_pattern_keep_their_ids(tokenizer, tmp_path):
    """The pattern is in the file: it kept line ends and the spaces after them together at the end of a text."""
    assert FORMER_PATTERN != PATTERN
    ranks = {bytes([b]): b for b in range(256)} | {b"\n ": 256}
    former = Tokenizer(FORMER_PATTERN, ranks, {"<|eos|>": 257})
    former.save(tmp_path / "t.json")
    loaded = open_tokenizer(str(tmp_path / "t.json"))
    assert loaded.fingerprint() == former.fingerprint()
    assert loaded.encode("a\n ") == [97, 256]
    assert Tokenizer(PATTERN, ranks, {"<|eos|>": 257}).encode("a\n ") == [97, 10, 32]


def test_half_a_million_white_space_characters_are_encoded(tokenizer):
    """The most that is allowed, wherever the pattern may look for their end."""
    for text in ("a" + " " * 499_999 + "b", " " * 500_000, "\n" * 499_999 + " ", " \n" * 250_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(TEXT, st.integers(1, 20))
@example("foo_\nx = _\n", 1)
def test_encoding_in_segments_changes_nothing(tokenizer, text, size):
    """Cuts lie where the pattern cuts anyway, for both supported patterns."""
    pieces = list(segments(text, size))
    assert "".join(pieces) == text
    for t in (tokenizer, Tokenizer(GPT2_PATTERN, tokenizer.codec.ranks, {})):
        assert [i for piece in pieces for i in t.encode(piece)] == t.encode(text)


def test_vocabulary_has_exactly_the_asked_size_and_says_what_is_unused(tokenizer):
    """A short text cannot fill it; the rest are named tokens."""
    small = Tokenizer.train(["hello hello world world"], 400)
    assert (small.vocab_size, tokenizer.vocab_size) == (400, 512)
    merged = sum(len(small.decode_bytes([i])) > 1 for i in range(256, small.special_id("<|bos|>")))
    assert small.n_unused == 400 - 256 - merged - len(SPECIAL_TOKENS) > 0
    assert small.decode([399]) == f"<|unused_{small.n_unused - 1}|>"
    assert sorted({i for i in range(400) if small.decode_bytes([i])}) == list(range(400))


def test_special_tokens_come_from_text_only_when_asked(tokenizer):
    """A lookalike in a document must not end it."""
    assert tokenizer.encode("<|eos|>", special=True) == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|eos|>")
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
    assert tokenizer.byte_lengths()[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    with pytest.raises(TokenizerError, match="did you mean '<think>'"):
        tokenizer.special_id("<thin>")


def test_a_token_that_no_merge_makes_is_still_found_by_both_libraries():
    """tiktoken looks a whole piece up before it merges; the file tells the other library to do so too."""
    single = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer(PATTERN, {**single, b"xyz": 256}, {"<|eos|>": 257})
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._to_json()))
    assert tokenizer.encode("xyz xyz") == other.encode("xyz xyz").ids == [256, *b" xyz"]


def test_training_and_saving_are_deterministic(tokenizer, tmp_path):
    """Same texts, same bytes on disk; the fingerprint survives the file and sees a change of pattern or token."""
    again = Tokenizer.train(TEXTS, 512)
    tokenizer.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = open_tokenizer(str(tmp_path / "a.json"))
    assert loaded.fingerprint() == tokenizer.fingerprint() == again.fingerprint()
    assert open_tokenizer(str(tmp_path / "a.json")).n_unused == tokenizer.n_unused
    assert Tokenizer.train(TEXTS, 511).fingerprint() != tokenizer.fingerprint()
    assert (
        Tokenizer(GPT2_PATTERN, tokenizer.codec.ranks, tokenizer.specials).fingerprint()
        != tokenizer.fingerprint()
    )


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_published_patterns_keep_their_meaning_in_a_saved_file(tokenizer, tmp_path_factory, text):
    """gpt2's regex as tiktoken has it, against the same tokenizer saved and opened by the other library."""
    from tiktoken_ext.openai_public import r50k_pat_str

    published = Tokenizer(r50k_pat_str, tokenizer.codec.ranks, {"<|endoftext|>": 511})
    assert published.eos_id == 511 and published.bos_id is None
    assert published.codec.pattern == GPT2_PATTERN
    other = tokenizers.Tokenizer.from_str(json.dumps(published._to_json()))
    other.encode_special_tokens = True
    assert published.encode(text) == other.encode(text).ids


def test_a_file_of_the_other_library_opens(tokenizer, tmp_path):
    """A GPT-2 style tokenizer.json: bytes without a separate split, merges as strings."""
    facts = tokenizer._to_json()
    facts["pre_tokenizer"] = {**facts["decoder"], "use_regex": True}
    facts["model"]["merges"] = [" ".join(pair) for pair in facts["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    ours = open_tokenizer(str(tmp_path))
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, special=True) == other.encode(text).ids


def _cut(facts):
    return json.dumps(facts)[:-100]


def _unordered(facts):
    facts["model"]["merges"].reverse()
    return json.dumps(facts)


def _no_byte(facts):
    del facts["model"]["vocab"]["A"]
    return json.dumps(facts)


def _normalizer(facts):
    return json.dumps({**facts, "normalizer": {"type": "NFC"}})


def _foreign(facts):
    return json.dumps({"hello": 1})


def _same_id(facts):
    facts["model"]["vocab"]["A"] = facts["model"]["vocab"]["B"]
    return json.dumps(facts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "damaged, not JSON"),
        (_unordered, "order of the merges"),
        (_no_byte, "no token for byte 65"),
        (_normalizer, "NFC is not supported"),
        (_foreign, "damaged, not a tokenizer.json"),
        (_same_id, "each needs its own"),
    ],
)
def test_damaged_and_unsupported_files_are_refused_in_one_line(tokenizer, tmp_path, damage, message):
    """The file is named, and what is wrong with it."""
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(tokenizer._to_json()))
    with pytest.raises(TokenizerError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_requests_are_refused_in_one_line(tokenizer, tmp_path):
    """Unknown names, missing files, impossible sizes and ids."""
    with pytest.raises(TokenizerError, match="did you mean 'gpt2'"):
        open_tokenizer("gpt3")
    with pytest.raises(TokenizerError, match="did you mean 'o200k_base'"):
        Tokenizer.named("o200k_bas")
    with pytest.raises(TokenizerError, match="does not exist"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="vocab_size=262 is below 263"):
        Tokenizer.train(TEXTS, 262)
    for wrong in (-1, 512):
        with pytest.raises(TokenizerError, match=f"id {wrong} is outside the vocabulary of 512"):
            tokenizer.decode([1, wrong])
    with pytest.raises(TokenizerError, match="500,001 white space characters"):
        tokenizer.encode("a" + " " * 500_001 + "b")


def test_a_published_encoding_without_network_says_what_to_do(tmp_path):
    """An empty cache and a proxy that refuses connections: one line that names TIKTOKEN_CACHE_DIR."""
    code = (
        "from jaxlm.tokenizer import open_tokenizer, TokenizerError\n"
        "try: open_tokenizer('cl100k_base')\n"
        "except TokenizerError as error: print(error)"
    )
    env = {
        "TIKTOKEN_CACHE_DIR": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "set TIKTOKEN_CACHE_DIR" in done.stdout and done.stdout.count("\n") == 1, done


def test_tokenizer_imports_no_framework():
    """Both columns share it, so it needs neither."""
    code = "import sys, jaxlm.tokenizer, jaxlm.data.shards, jaxlm.data.loader, jaxlm.data.baselines\n"
    code += "print([m for m in ('jax', 'torch', 'grain', 'pyarrow') if m in sys.modules])"
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done


def test_byte_lengths_are_those_of_the_tokens(tokenizer):
    """What bits per byte are computed from."""
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (512,)
    first_special = tokenizer.special_id("<|bos|>")
    assert all(lengths[i] == len(tokenizer.decode_bytes([i])) for i in range(first_special))
    assert lengths[first_special:].sum() == 0
    assert PATTERN in json.dumps(tokenizer._to_json()["pre_tokenizer"]).replace("\\\\", "\\")
