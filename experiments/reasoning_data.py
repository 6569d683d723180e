"""What the stages of experiments.reasoning read, as files that experiments.pretrain, sft and dpo open as well."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.reasoning_sums import (
    TWO_DIGIT,
    Pairs,
    Sum,
    conversations,
    documents,
    held_out,
    leaks,
    problems,
    questions,
)
from jaxlm.chat import chatml, special_tokens
from jaxlm.config import require
from jaxlm.data.corpus import DataError
from jaxlm.disk import replace_text
from jaxlm.json_file import read_object
from jaxlm.tokenizer import Tokenizer

_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?=\d)")
_TAGS = re.compile("</?think>")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    held_out: int = 700  # unordered pairs of two-digit numbers that occur nowhere, and are the exam
    three_digit: int = 200  # likewise of three-digit numbers, beside it
    documents: int = 36_000  # worked sums that the base model reads
    conversations: int = 8_000  # questions with their answers
    asked: int = 600  # questions whose replies are compared
    samples: int = 6  # replies to each
    reply_tokens: int = 110  # of a reply at most

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value > 0, f"sizes.{name}={value} must be positive")
        require(self.samples > 1, f"sizes.samples={self.samples} leaves nothing to compare; at least 2")
        require(
            self.held_out <= TWO_DIGIT // 2,
            f"sizes.held_out={self.held_out} of {TWO_DIGIT:,} pairs leaves too few to learn from; at most half",
        )
        require(self.three_digit <= 10_000, f"sizes.three_digit={self.three_digit} must not exceed 10,000")


@dataclass(frozen=True)
class DataFolder:
    """RUN/data."""

    path: Path
    sizes: Sizes
    seed: int

    @property
    def tokenizer_file(self) -> Path:
        """Of all stages."""
        return self.path / "tokenizer.json"

    @property
    def documents(self) -> Path:
        """What the base reads: {"text": …}."""
        return self.path / "pretrain.jsonl"

    @property
    def conversations(self) -> Path:
        """What supervised fine-tuning shows: {"messages": […]}."""
        return self.path / "sft.jsonl"

    @property
    def preferences(self) -> Path:
        """What preference learning compares: {"prompt": […], "chosen": […], "rejected": […]}."""
        return self.path / "preferences.jsonl"

    @property
    def held_out_file(self) -> Path:
        """What occurs in none of them: {"two_digit": [[a, b], …], "three_digit": […]}; written last."""
        return self.path / "held_out.json"

    @cached_property
    def _held_out(self) -> tuple[Pairs, Pairs]:
        return held_out(self.sizes.held_out, self.sizes.three_digit, self.seed)

    @property
    def kept_out(self) -> Pairs:
        """All pairs of the exam."""
        small, large = self._held_out
        return small | large

    def exam(self) -> tuple[list[Sum], list[Sum]]:
        """Held-out sums of two-digit and of three-digit numbers, each pair in one of its orders."""
        small, large = self._held_out
        return questions(small, self.seed), questions(large, self.seed)

    def asked(self) -> list[Sum]:
        """Questions whose replies are compared."""
        return list(itertools.islice(problems(f"asked {self.seed}", self.kept_out), self.sizes.asked))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of all stages. Raises TokenizerError."""
        return Tokenizer.load(self.tokenizer_file)

    def make(self, vocab_size: int) -> None:
        """Writes all but the preferences, unless they are there. Raises DataError, TokenizerError."""
        if self.held_out_file.is_file():
            return
        texts = documents(self.sizes.documents, self.seed, self.kept_out)
        taught = conversations(self.sizes.conversations, self.seed, self.kept_out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tokenizer = train_tokenizer([*texts, *strings(taught)], vocab_size)
            tokenizer.save(self.tokenizer_file)
            _write(self.documents, ({"text": text} for text in texts))
            _write(self.conversations, ({"messages": talk} for talk in taught))
            small, large = map(sorted, self._held_out)
            replace_text(self.held_out_file, json.dumps({"two_digit": small, "three_digit": large}) + "\n")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from None

    def keep_preferences(self, pairs: list[dict[str, Any]]) -> None:
        """Writes them, but for those in which a sampled reply happens to write a sum of the exam.

        Raises DataError where there are too few to learn from.
        """
        clean = [pair for pair in pairs if not leaks(strings(pair), self.kept_out)]
        if len(clean) < 2:
            raise DataError(
                f"{len(clean)} preferences came of {self.sizes.asked:,} questions: the replies to each are all alike; "
                "ask more with --sizes.asked and --sizes.samples"
            )
        _write(self.preferences, clean)

    def check(self) -> dict[str, int]:
        """Texts in each file, none of which holds a pair of the exam: those in the files, whoever wrote them.

        Raises DataError where one does, with its line; or where a file cannot be read.
        """
        kept_out, found = self._stored(), {}
        for path in (self.documents, self.conversations, self.preferences):
            if not path.is_file() and path == self.preferences:
                continue
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
                texts = [list(strings(json.loads(line))) for line in lines]
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None
            except ValueError as error:
                raise DataError(f"{path} is damaged: {error}") from None
            for number, row in enumerate(texts, 1):
                if bad := leaks(row, kept_out):
                    raise DataError(f"{path}, line {number}: holds a sum that is held out: {bad[0]!r}")
            found[path.name] = len(lines)
        return found

    def _stored(self) -> Pairs:
        try:
            stored = read_object(self.held_out_file)
            return frozenset((min(p), max(p)) for name in ("two_digit", "three_digit") for p in stored[name])
        except OSError as error:
            raise DataError(f"{self.held_out_file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.held_out_file} is damaged: {error}") from None


def strings(value: Any) -> Iterator[str]:
    """Every text of what JSON may hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose digits are single tokens: in what it learns from, no two stand together. Speaks ChatML."""
    template = chatml()
    apart = (_BETWEEN_DIGITS.sub(" ", _TAGS.sub("\n", text)) for text in texts)
    return Tokenizer.train(apart, vocab_size, specials=special_tokens(template), chat_template=template)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
