"""Conversations and preferences to learn from: encoded with what carries loss, counted, split for validation."""

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jaxlm.chat import Chat
from jaxlm.chat_masks import encode_turns
from jaxlm.config import ConfigError
from jaxlm.data.blocks import DataError
from jaxlm.data.chat_rows import BadRow, ChatRow, Conversation, Messages, Preference
from jaxlm.data.chat_sources import Conversations, open_conversations
from jaxlm.data.examples import Examples, Pairs, answers_of
from jaxlm.tokenizer import Tokenizer, TokenizerError
from jaxlm.tune_config import ChatConfig

__all__ = [
    "Conversations",
    "Statistics",
    "encode_conversations",
    "encode_preferences",
    "open_conversations",
    "split_validation",
]

Say = Callable[[str], None]
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids int32 [n], carries bool [n], said bool [n]
Data = TypeVar("Data", Examples, Pairs)
_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class Statistics:
    """What became of rows. Tokens of preferences are those of both answers, each with its prompt."""

    what: str = "examples"  # what is counted: examples, or pairs
    examples: int = 0
    sequences: int = 0  # examples, or the two of each pair
    tokens: int = 0
    loss_tokens: int = 0  # those that carry loss
    longest: int = 0  # tokens of a sequence
    truncated: int = 0  # examples of which the end was cut off
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows

    @property
    def share(self) -> float:
        """Of the tokens that carry loss."""
        return self.loss_tokens / max(1, self.tokens)

    @property
    def mean(self) -> float:
        """Tokens of a sequence."""
        return self.tokens / max(1, self.sequences)

    def lines(self) -> list[str]:
        """For a reader."""
        dropped = sum(self.dropped.values())
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.dropped.items(), key=lambda i: -i[1]))
        return [
            f"{self.examples:,} {self.what}, {self.tokens:,} tokens: {self.mean:,.1f} on average, "
            f"{self.longest:,} the longest",
            f"{self.loss_tokens:,} tokens carry loss, {self.share:.1%}",
            f"{self.truncated:,} truncated, {dropped:,} dropped{f': {why}' if why else ''}",
        ]


def encode_conversations(
    rows: Iterable[ChatRow],
    tokenizer: Tokenizer,
    template: str | Chat,
    chat: ChatConfig,
    limit: int,
    say: Say = lambda line: None,
) -> tuple[Examples, Statistics]:
    """Conversations to learn what the assistant says.

    Args:
        template: Jinja; a Chat also has the special tokens that a model's files name.
        chat: its policies: think, too_long, bad_rows.
        limit: most tokens of an example: seq_len + 1, since the last is only predicted.
        say: told of progress now and then, a line each.

    Raises:
        DataError: under the policies, with the place of the row; or no row is left.
        TokenizerError: a text cannot be encoded.
    """
    made = _Encoder(tokenizer, template, chat, limit, say, Conversation)
    for row in rows:
        made.add(row)
    examples, statistics = made.result("examples")
    return examples[0], statistics


def encode_preferences(
    rows: Iterable[ChatRow],
    tokenizer: Tokenizer,
    template: str | Chat,
    chat: ChatConfig,
    limit: int,
    say: Say = lambda line: None,
) -> tuple[Pairs, Statistics]:
    """Preferences: of each side the whole conversation, and what the assistant says after the prompt carries loss.

    Arguments and errors are those of `encode_conversations`; `limit` holds for each side.
    """
    made = _Encoder(tokenizer, template, chat, limit, say, Preference)
    for row in rows:
        made.add(row)
    (chosen, rejected), statistics = made.result("pairs")
    return Pairs(chosen, rejected), statistics


class _Bad(Exception):
    """(reason, message) of a row that cannot be used."""


class _TooLong(Exception):
    """(reason, message) of a row that policy or length leaves out."""


class _Encoder:
    """Rows to examples end to end, in arrays of 5 bytes a token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Chat,
        policy: ChatConfig,
        limit: int,
        say: Say,
        kind: type[Conversation] | type[Preference],
    ) -> None:
        self._tokenizer, self._template, self._policy, self._limit = tokenizer, template, policy, limit
        self._kind, self._say, self._told = kind, say, time.monotonic()
        self._sides = [_Side() for _ in range(1 if kind is Conversation else 2)]
        self._truncated, self._dropped, self._first_dropped = 0, Counter[str](), ""

    def add(self, row: ChatRow) -> None:
        """One row. Raises DataError where the policies refuse it."""
        try:
            encoded = self._fitted(self._encoded(row))
        except (_Bad, _TooLong) as error:
            reason, message = error.args
            long = isinstance(error, _TooLong)
            if (self._policy.too_long if long else self._policy.bad_rows) == "refuse":
                flag = "--chat.too-long truncate or drop" if long else "--chat.bad-rows drop"
                raise DataError(f"{row.where}: {message} ({flag} would not refuse it)") from None
            self._dropped[reason] += 1
            self._first_dropped = self._first_dropped or f"{row.where}: {message}"
        else:
            for side, example in zip(self._sides, encoded):
                side.add(*example)
        if time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            self._say(f"{len(self._sides[0]):,} examples, {self._dropped.total():,} rows dropped so far")

    def result(self, what: str) -> tuple[list[Examples], Statistics]:
        """The examples of each side. Raises DataError where there are none."""
        if not len(self._sides[0]):
            why = f"all {self._dropped.total():,} rows were dropped, the first: {self._first_dropped}"
            raise DataError(f"there is nothing to learn from: {why if self._dropped else 'no rows'}")
        made = [side.examples(self._tokenizer.fingerprint()) for side in self._sides]
        statistics = Statistics(
            what,
            len(made[0]),
            sum(map(len, made)),
            sum(len(side.ids) for side in made),
            sum(side.loss_tokens for side in made),
            max(int(side.lengths.max()) for side in made),
            self._truncated,
            dict(self._dropped),
        )
        return made, statistics

    def _encoded(self, row: ChatRow) -> list[Encoded]:
        if isinstance(row, BadRow):
            raise _Bad(row.reason, row.message)
        if not isinstance(row, self._kind):
            told = ["a conversation", "a preference"]
            found, wanted = told if isinstance(row, Conversation) else told[::-1]
            raise _Bad(f"not {wanted}", f"it is {found}, not {wanted}")
        try:
            if isinstance(row, Conversation):
                return [self._one(row.messages, 0)]
            first = len(row.prompt)
            return [self._one([*row.prompt, *side], first) for side in (row.chosen, row.rejected)]
        except TokenizerError as error:
            raise _Bad("not to be encoded", str(error)) from None
        except ConfigError as error:
            raise _Bad("template error", str(error)) from None

    def _one(self, messages: Messages, first: int) -> Encoded:
        encoded = encode_turns(self._tokenizer, self._template, messages, self._policy.think, first)
        if not encoded[1][1:].any():
            raise _Bad("nothing to learn", "no token of what the assistant says carries loss")
        return encoded

    def _fitted(self, whole: list[Encoded]) -> list[Encoded]:
        """Cut to the limit, where the policy says so."""
        if len(whole) == 2 and np.array_equal(whole[0][0], whole[1][0]):
            raise _Bad(
                "chosen equals rejected", "chosen and rejected are the same tokens, which teaches nothing"
            )
        longest = max(len(ids) for ids, _, _ in whole)
        if longest <= self._limit:
            return whole
        if self._policy.too_long != "truncate":
            raise _TooLong(
                "too long", f"it has {longest:,} tokens, more than the {self._limit:,} of an example"
            )
        cut = [
            (ids[: self._limit], carries[: self._limit], said[: self._limit]) for ids, carries, said in whole
        ]
        if not all(carries[1:].any() for _, carries, _ in cut):
            raise _TooLong("too long to reach an answer", f"its first {self._limit:,} tokens hold no answer")
        if len(cut) == 2 and np.array_equal(cut[0][0], cut[1][0]):
            raise _TooLong(
                "too long to differ", f"the first {self._limit:,} tokens of both answers are the same"
            )
        self._truncated += 1
        return cut


class _Side:
    """Examples end to end, while they are made."""

    def __init__(self) -> None:
        self._ids, self._carries, self._ends = array("i"), bytearray(), array("q", [0])
        self._answers = array("q")  # two of each

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, ids: np.ndarray, carries: np.ndarray, said: np.ndarray) -> None:
        self._ids.frombytes(ids.astype(np.int32).tobytes())
        self._carries += carries.tobytes()
        self._ends.append(len(self._ids))
        self._answers.extend(answers_of(said, carries))

    def examples(self, tokenizer: str) -> Examples:
        ids, carries = np.frombuffer(self._ids, np.int32), np.frombuffer(self._carries, bool)
        answers = np.frombuffer(self._answers, np.int64).reshape(-1, 2)
        parts = (slice(a, b) for a, b in zip(self._ends, self._ends[1:]))
        examples = ((ids[part], carries[part], at) for part, at in zip(parts, answers))
        return Examples.of(examples, tokenizer)


def split_validation(data: Data, share: float, seed: int = 0) -> tuple[Data, Data]:
    """(to train on, to validate on) of what is encoded, each in its order, at least one example on either side.

    A hash of the content decides, so neither the order of the data nor what else is there moves an example, up to
    the border of the share, and the same content is never on both sides. Of preferences the prompt is hashed.

    Args:
        share: of different contents to validate on, in (0, 1).

    Raises:
        DataError: there are not two different contents.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share to validate on is {share}; it must be in (0, 1)")
    hashes = np.array([_hash(data, i, seed) for i in range(len(data))], np.uint64)
    different = np.unique(hashes)
    if len(different) < 2:
        what = "prompt" if isinstance(data, Pairs) else "example"
        raise DataError(
            f"there is only one {what}, so none can be held out to validate on; give --val, or more data"
        )
    count = min(max(1, round(share * len(different))), len(different) - 1)
    held_out = hashes <= different[count - 1]
    return _taken(data, np.flatnonzero(~held_out)), _taken(data, np.flatnonzero(held_out))


def _hash(data: Examples | Pairs, i: int, seed: int) -> int:
    if isinstance(data, Pairs):
        content = data.chosen.example(i)[0][: data.chosen.answers[i, 0]]
    else:
        content = data.example(i)[0]
    digest = hashlib.blake2b(content.tobytes(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def _taken(data: Data, chosen: np.ndarray) -> Data:
    if isinstance(data, Pairs):
        return Pairs(_taken(data.chosen, chosen), _taken(data.rejected, chosen))
    return Examples.of(((*data.example(int(i)), data.answers[i]) for i in chosen), data.fingerprint)
