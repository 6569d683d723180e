"""Text in, text out: prompts to ids, ids to text as they come, stop strings; no jax, no torch.

A token is a piece of bytes: a character may need several, and a stop string may begin in one and end in the next.
What is handed out is certain: whole characters that no stop string can still claim.
"""

import bisect
import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxlm.config import ConfigError
from jaxlm.sampling import Answer, Sampling
from jaxlm.tokenizer import Tokenizer, TokenizerError

Prompt = str | Sequence[int]  # text, or ids that are taken as they are
Ended = Callable[[int, Sequence[int]], bool]  # (row, ids of its answer so far) -> whether the answer is over
Decode = Callable[[list[list[int]], Sampling, Ended | None], list[list[Answer]]]


class Completion(NamedTuple):
    """What a model wrote after a prompt, as text."""

    prompt: str
    text: str  # without the stop string
    ids: list[int]  # the tokens that the text needs: the last may reach beyond it, into the stop string
    logprobs: list[float]  # one for each id under the model's own softmax; empty if not asked
    finish: str  # "stop": a stop token or stop string came; "length": max_new_tokens were made
    score: float  # beam search: sum of log-probabilities / length ** length_penalty; else 0


class StopSearch:
    """Finds the first of several strings in text that comes in pieces, at constant cost per character; a str is one.

    First is what ends first; of several that end at one character, the longest. So the result does not depend on how
    the text was cut. Algorithm: Knuth, Morris, Pratt 1977, one automaton per string.

    Raises:
        ConfigError: a string is empty or not valid UTF-8.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        strings = _several(strings)
        for string in strings:
            if not string:
                raise ConfigError("a stop string is empty; it would end every answer before it begins")
            require_utf8(string, f"the stop string {string!r}")
        self._strings = tuple(dict.fromkeys(strings))
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)  # characters of each string that the text ends with
        self._held = ""  # the end of the text that may be the beginning of a string
        self.found = False

    def feed(self, text: str) -> str:
        """The text that lies certainly before any match, in addition to what was returned before."""
        if self.found or not self._strings:
            return "" if self.found else text
        for i, character in enumerate(text):
            if length := self._step(character):
                whole = self._held + text[: i + 1]
                self.found, self._held = True, ""
                return whole[: len(whole) - length]
        whole = self._held + text
        certain = len(whole) - max(self._matched)
        self._held = whole[certain:]
        return whole[:certain]

    def end(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        """Length of the longest string that ends with `character`, 0 if none does."""
        longest = 0
        for n, (string, borders) in enumerate(zip(self._strings, self._borders)):
            matched = self._matched[n]
            while matched and string[matched] != character:
                matched = borders[matched - 1]
            matched += string[matched] == character
            self._matched[n] = matched
            if matched == len(string):
                longest = max(longest, matched)
        return longest


def _borders(string: str) -> list[int]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its suffix."""
    borders, matched = [0], 0
    for character in string[1:]:
        while matched and string[matched] != character:
            matched = borders[matched - 1]
        matched += string[matched] == character
        borders.append(matched)
    return borders


class Reader:
    """Text of ids that come one by one. Bytes that are not UTF-8 become U+FFFD, as in `Tokenizer.decode`.

    An id that only pads the model's vocabulary stands for no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._search = StopSearch(stop_strings)
        self.length = 0  # characters decoded, those held back included

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; the text before it is complete then."""
        return self._search.found

    def add(self, token: int) -> str:
        """The text that has become certain with `token`, often ''."""
        if token >= self._tokenizer.vocab_size:
            return ""
        return self._feed(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """The rest, when no more tokens will come."""
        return self._feed(self._decoder.decode(b"", final=True)) + self._search.end()

    def _feed(self, text: str) -> str:
        self.length += len(text)
        return self._search.feed(text)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int], stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """Text of ids as it becomes certain, up to the first stop string; then `ids`, if a generator, is closed.

    Without stop strings the pieces, joined, are `tokenizer.decode(ids)`.

    Raises:
        ConfigError: a stop string is empty or not valid UTF-8; at once.
    """
    reader = Reader(tokenizer, stop_strings)
    return _pieces(reader, ids)


def _pieces(reader: Reader, ids: Iterable[int]) -> Iterator[str]:
    try:
        for token in ids:
            if piece := reader.add(token):
                yield piece
            if reader.stopped:
                return
        if piece := reader.end():
            yield piece
    finally:
        if close := getattr(ids, "close", None):
            close()


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, front: Sequence[int] = ()) -> list[int]:
    """Ids of a prompt: of a text with `front` before them, or those given.

    Raises:
        ConfigError: the prompt is empty or not valid UTF-8.
    """
    if not prompt:
        raise ConfigError(
            "the prompt is empty: give some text, or --unprompted to continue the separator of documents"
        )
    if not isinstance(prompt, str):
        return list(prompt)
    require_utf8(prompt, "the prompt")
    return [*front, *tokenizer.encode(prompt)]


def separator(tokenizer: Tokenizer, front: Sequence[int] = ()) -> list[int]:
    """What stands before a text that follows nothing: `front`, or the token that ends a document.

    Raises:
        ConfigError: there is neither.
    """
    if front:
        return list(front)
    if tokenizer.eos_id is None:
        raise ConfigError("the tokenizer has no token that separates documents; give a prompt")
    return [tokenizer.eos_id]


def token_ids(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    """Ids of tokens given as text: special tokens, or any text that is exactly one token; a str is one name.

    Raises:
        TokenizerError: a text is neither; the nearest special token is named.
    """
    return tuple(_token_id(tokenizer, name) for name in _several(names))


def _token_id(tokenizer: Tokenizer, name: str) -> int:
    require_utf8(name, f"the token {name!r}")
    try:
        return tokenizer.special_id(name)
    except TokenizerError as error:
        ids = tokenizer.encode(name)
        if len(ids) != 1:
            raise TokenizerError(
                f"{error}, and as text it is {len(ids)} tokens, not one; a stop string may be any text"
            ) from None
        return ids[0]


def complete(
    decode: Decode,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
    settings: Sampling,
    *,
    front: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
) -> list[list[Completion]]:
    """The answers to each prompt as text, best first: [prompt][sample].

    A stop string ends the text before it and cuts ids and log-probabilities to the tokens that the text needs; the
    score stays that of the whole answer.

    Args:
        decode: (prompts as ids, settings, ended) -> [prompt][sample] answers, by whichever framework. `ended(row, ids)`
            says whether the ids so far hold a stop string; rows are counted through all samples. It only saves work.
        prompts: one text or several; ids in place of a text are taken as they are.
        front: ids before each text, such as bos.
        stop_tokens: tokens as text that end an answer beside `settings.stop`.

    Raises:
        ConfigError: a prompt or stop string is empty or not valid UTF-8, or what `decode` raises.
        TokenizerError: a stop token is unknown.
    """
    texts: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
    StopSearch(stop_strings)
    rows = [encode_prompt(tokenizer, prompt, front) for prompt in texts]
    stop = tuple(dict.fromkeys((*settings.stop, *token_ids(tokenizer, stop_tokens))))
    watch = _Watch(tokenizer, stop_strings) if stop_strings else None
    answers = decode(rows, dataclasses.replace(settings, stop=stop), watch)
    spelled = [p if isinstance(p, str) else "".join(stream_text(tokenizer, p)) for p in texts]
    return [
        [_completion(tokenizer, prompt, answer, stop_strings) for answer in of_one]
        for prompt, of_one in zip(spelled, answers)
    ]


class _Watch:
    """`ended` for `decode`: reads of each row only what is new."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._make = lambda: Reader(tokenizer, stop_strings)
        self._rows: dict[int, tuple[Reader, int]] = {}

    def __call__(self, row: int, ids: Sequence[int]) -> bool:
        reader, read = self._rows.get(row) or (self._make(), 0)
        for token in ids[read:]:
            reader.add(int(token))
        self._rows[row] = reader, len(ids)
        return reader.stopped


def _completion(tokenizer: Tokenizer, prompt: str, answer: Answer, stop_strings: Sequence[str]) -> Completion:
    reader = Reader(tokenizer, stop_strings)
    text, decoded = "", []  # decoded: characters known after each token
    for token in answer.ids:
        text += reader.add(token)
        decoded.append(reader.length)
        if reader.stopped:
            break
    text += reader.end()
    needed = len(answer.ids)
    if reader.stopped:
        needed = min(bisect.bisect_left(decoded, len(text)) + 1, needed) if text else 0
    return Completion(
        prompt,
        text,
        list(answer.ids[:needed]),
        list(answer.logprobs[:needed]),
        "stop" if reader.stopped else answer.finish,
        answer.score,
    )


def _several(texts: Sequence[str]) -> Sequence[str]:
    """Texts, or the only one: its letters, which are a sequence of texts as well, are never meant."""
    return (texts,) if isinstance(texts, str) else texts


def require_utf8(text: str, what: str) -> None:
    """Raises ConfigError where `text` holds what no UTF-8 can: a byte of the command line that was none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{what} is not valid UTF-8") from None
