"""The text surface: whole characters and stop strings wherever token borders lie; ids, stop tokens, completions."""

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import ConfigError, InputError
from jaxlm.sampling import Answer, Sampling
from jaxlm.text import (
    Completion,
    Reader,
    StopSearch,
    complete,
    encode_prompt,
    separator,
    stream_text,
    token_ids,
)
from jaxlm.tokenizer import PATTERN, Tokenizer

# Characters of one to four bytes, or two letters only: stop strings drawn from so few do occur, and overlap themselves.
MIXED, LETTERS = st.sampled_from("aab é漢😀\n�"), st.sampled_from("ab")
TEXT = st.text(MIXED, max_size=30) | st.text(LETTERS, max_size=30)
STOPS = st.lists(
    st.text(MIXED, min_size=1, max_size=5) | st.text(LETTERS, min_size=2, max_size=6), max_size=3
)
CUTS = st.sets(st.integers(1, 120))
SPECIAL = "<|end|>"


def cut_into_tokens(data: bytes, cuts: set[int]) -> tuple[Tokenizer, list[int]]:
    """A tokenizer whose tokens are the pieces of `data` between the cuts, and the ids that spell it."""
    borders = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    pieces = [data[a:b] for a, b in zip(borders, borders[1:])]
    tokens = list(dict.fromkeys([*(bytes([b]) for b in range(256)), *pieces]))
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(PATTERN, ranks, {SPECIAL: len(ranks)}), [ranks[piece] for piece in pieces]


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Every byte a token of its own, and three special tokens."""
    return Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {"<|eos|>": 256, SPECIAL: 257, "<x>": 258})


def first_match(text: str, strings: Sequence[str]) -> int | None:
    """Where the match begins that ends first, and of those the longest: by str.find on the whole text."""
    ends = [(at + len(s), at) for s in strings if (at := text.find(s)) >= 0]
    return min(ends)[1] if ends else None


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(TEXT, st.text(max_size=20)), cuts=CUTS)
def test_any_split_of_any_text_streams_to_the_same_text(text: str, cuts: set[int]) -> None:
    """Whatever bytes make a token: the pieces join to the text, and no piece breaks a character."""
    tokenizer, ids = cut_into_tokens(text.encode(), cuts)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == text
    assert all(pieces) and sum(piece.count("�") for piece in pieces) == text.count("�")


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=24) | TEXT.map(lambda t: t.encode()[1:-1]), cuts=CUTS)
def test_bytes_that_are_no_text_stream_as_decode_writes_them(data: bytes, cuts: set[int]) -> None:
    """U+FFFD stands where `decode` of all ids puts it, for every prefix of the ids."""
    tokenizer, ids = cut_into_tokens(data, cuts)
    for n in {len(ids), len(ids) // 2}:
        assert "".join(stream_text(tokenizer, ids[:n])) == tokenizer.decode(ids[:n])


@settings(max_examples=300, deadline=None)
@given(text=TEXT, cuts=CUTS, stops=STOPS)
def test_a_stop_string_is_found_wherever_token_borders_lie(
    text: str, cuts: set[int], stops: list[str]
) -> None:
    """The streamed text is what str.find on the whole text leaves; nothing after the match is even asked for."""
    tokenizer, ids = cut_into_tokens(text.encode(), cuts)
    at = first_match(text, stops)
    kept = text if at is None else text[:at]
    taken: list[int] = []
    pieces = list(stream_text(tokenizer, (taken.append(i) or i for i in ids), stops))
    assert "".join(pieces) == kept
    if at is not None:
        assert first_match(tokenizer.decode(taken), stops) == at
        before = tokenizer.decode_bytes(taken[:-1]).decode("utf-8", errors="ignore")
        assert first_match(before, stops) is None, "one token earlier it was not there"


@settings(max_examples=150, deadline=None)
@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_back_than_a_stop_string_may_claim(text: str, stops: list[str]) -> None:
    """After each character, what is out plus the longest suffix that begins a stop string is the whole text so far."""
    search, out = StopSearch(stops), ""
    for n, character in enumerate(text, 1):
        out += search.feed(character)
        if search.found:
            break
        prefixes = {s[:k] for s in stops for k in range(1, len(s))}
        held = max((len(p) for p in prefixes if text[:n].endswith(p)), default=0)
        assert out == text[: n - held]
    assert search.found == (first_match(text, stops) is not None)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, cuts=CUTS, stops=STOPS)
def test_completions_are_cut_to_the_tokens_that_their_text_needs(
    text: str, cuts: set[int], stops: list[str]
) -> None:
    """ids and log-probabilities end with the first token that completes the kept text."""
    tokenizer, ids = cut_into_tokens(text.encode(), cuts)
    answer = Answer(ids, [-float(n) for n in range(len(ids))], "length", 0.25)
    [[got]] = complete(lambda *_: [[answer]], tokenizer, "a", Sampling(), stop_strings=stops)
    at = first_match(text, stops)
    kept = text if at is None else text[:at]
    assert got == Completion(
        "a", kept, ids[: len(got.ids)], answer.logprobs[: len(got.ids)], got.finish, 0.25
    )
    assert got.finish == ("length" if at is None else "stop")
    assert tokenizer.decode(got.ids).startswith(kept)
    if at is None:
        assert got.ids == ids
    elif got.ids:
        assert not tokenizer.decode_bytes(got.ids[:-1]).startswith(kept.encode())


def test_the_cost_of_a_token_is_that_of_its_text() -> None:
    """100,000 characters that almost match a long stop string all the time are read in about linear time."""
    import time

    def seconds(n: int) -> float:
        search, started = StopSearch(["a" * 5000 + "b"]), time.perf_counter()
        for _ in range(n):
            search.feed("aaaa")
        return time.perf_counter() - started

    seconds(100)
    assert seconds(24_000) < 30 * max(seconds(4_000), 1e-3), "six times the tokens, not thirty times the work"


def test_ids_beyond_the_tokenizer_are_no_text() -> None:
    """A model's vocabulary may be padded; such an id writes nothing and breaks no character."""
    ids = [300, *"é😀".encode(), 259]
    ids.insert(2, 999)
    assert "".join(stream_text(byte_tokenizer(), ids)) == "é😀"
    assert Reader(byte_tokenizer()).add(259) == ""


def test_prompts_are_encoded_with_what_stands_in_front() -> None:
    """bos in front of a text; ids as they are; special tokens in a text are ordinary text."""
    tokenizer = byte_tokenizer()
    assert encode_prompt(tokenizer, "é", (256,)) == [256, *"é".encode()]
    assert encode_prompt(tokenizer, [7, 8], (256,)) == [7, 8]
    assert encode_prompt(tokenizer, SPECIAL) == list(SPECIAL.encode())
    assert separator(tokenizer) == [256] and separator(tokenizer, (257,)) == [257]


def test_bad_prompts_are_one_line() -> None:
    """Empty, or not UTF-8; the message says how to start from nothing."""
    for prompt in ("", []):
        with pytest.raises(ConfigError, match=r"prompt is empty: .*--unprompted") as caught:
            encode_prompt(byte_tokenizer(), prompt, (256,))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="prompt is not valid UTF-8"):
        encode_prompt(byte_tokenizer(), "a\udcff")
    bare = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {})
    with pytest.raises(ConfigError, match="no token that separates documents"):
        separator(bare)


def test_stop_tokens_are_named_by_their_text() -> None:
    """Special tokens and texts of one token; others are refused with the nearest special token."""
    tokenizer = byte_tokenizer()
    assert token_ids(tokenizer, [SPECIAL, "\n", "<x>"]) == (257, 10, 258)
    for name, message in (
        ("<|edn|>", r"'<\|edn\|>' \(did you mean '<\|end\|>'\?\)"),
        ("é", "2 tokens"),
        ("", "0 tokens"),
        ("\udcff", "not valid UTF-8"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            token_ids(tokenizer, ["<x>", name])
        assert "\n" not in str(caught.value)


def test_bad_stop_strings_are_refused_before_anything_is_decoded() -> None:
    """An empty one would end every answer; one that is not UTF-8 can never come."""

    def decode(*_: object) -> list[list[Answer]]:
        raise AssertionError("was asked")

    for stop, message in (("", "stop string is empty"), ("\udcff", "not valid UTF-8")):
        with pytest.raises(ConfigError, match=message):
            complete(decode, byte_tokenizer(), "a", Sampling(), stop_strings=["x", stop])
        with pytest.raises(ConfigError, match=message):
            stream_text(byte_tokenizer(), [], [stop])


def test_decoding_is_asked_once_and_can_ask_when_a_row_has_ended() -> None:
    """`ended` reads each row on its own, whatever it was told before; stop tokens join those of the settings."""
    tokenizer, asked = byte_tokenizer(), []

    def decode(rows: list[list[int]], chosen: Sampling, ended) -> list[list[Answer]]:
        asked.append((rows, chosen.stop))
        ids = {0: list(b"OP ST"), 1: list(b"SSTOP")}
        over = {row: [n for n in range(len(i) + 3) if ended(row, i[:n])] for row, i in ids.items()}
        assert over == {0: [], 1: [5, 6, 7]}
        assert ended(0, [*ids[0], *b"OP and more"]) and not ended(2, [])
        return [[Answer([*ids[0], *b"OP!"], [], "length", 0.0), Answer(ids[1], [], "length", 0.0)]] * len(
            rows
        )

    got = complete(
        decode,
        tokenizer,
        ["a", [98, 256]],
        Sampling(stop=(3, 257), samples=2),
        front=(256,),
        stop_strings=["STOP"],
        stop_tokens=[SPECIAL, "<x>"],
    )
    assert asked == [([[256, 97], [98, 256]], (3, 257, 258))]
    assert [[c.prompt for c in row] for row in got] == [["a", "a"], ["b<|eos|>", "b<|eos|>"]]
    assert [(c.text, c.ids, c.finish) for c in got[0]] == [
        ("OP ", list(b"OP "), "stop"),
        ("S", list(b"S"), "stop"),
    ]


def test_a_stream_that_is_left_closes_its_source() -> None:
    """Decoding ends with the stop string, and when nobody reads on."""
    closed = []

    def ids():
        try:
            yield from b"abSTOPcd"
        finally:
            closed.append(True)

    assert "".join(stream_text(byte_tokenizer(), ids(), ["STOP"])) == "ab" and closed == [True]
    pieces = stream_text(byte_tokenizer(), ids())
    assert next(pieces) == "a"
    pieces.close()
    assert closed == [True, True]


def test_one_text_is_not_its_letters() -> None:
    """A stop string or stop token given bare means what one in a list means."""
    search = StopSearch("ab")
    assert search.feed("xa") + search.feed("b") == "x" and search.found
    assert token_ids(byte_tokenizer(), SPECIAL) == token_ids(byte_tokenizer(), [SPECIAL]) == (257,)
