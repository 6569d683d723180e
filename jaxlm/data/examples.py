"""Examples to fine-tune on: token ids, and which of them carry loss; and pairs of a chosen and a rejected answer.

Example x of n tokens is trained as inputs x[:-1] and targets x[1:]; target t carries loss where token t + 1 does. Its
first token is never a target, so whether that one carries loss does not matter.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxlm.data.blocks import DataError

Tokens = np.ndarray | Sequence[int]
Carries = np.ndarray | Sequence[bool]
Answers = np.ndarray | Sequence[int]  # where the first and the last answer begin


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples end to end; number i holds the tokens starts[i] to starts[i+1] - 1.

    Raises:
        DataError: an example has fewer than two tokens, or none that carries loss; or there is no example.
        ValueError: dtypes, lengths, starts or answers do not fit together.
    """

    ids: np.ndarray  # int32 [total]
    carries: np.ndarray  # bool [total], whether a token carries loss
    starts: np.ndarray  # int64 [n+1], ascending from 0 to total
    answers: np.ndarray  # int64 [n, 2], where in an example the first and the last answer begin
    fingerprint: str  # of tokenizer, ids, carries and starts

    def __post_init__(self) -> None:
        for name, dtype in (("ids", np.int32), ("carries", np.bool_), ("starts", np.int64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}; it must be {dtype.__name__} [n]"
                )
        if len(self.ids) != len(self.carries):
            raise ValueError(f"{len(self.ids)} ids have {len(self.carries)} carries")
        if len(self.starts) < 2:
            raise DataError("there are no examples")
        if self.starts[0] != 0 or self.starts[-1] != len(self.ids):
            raise ValueError(
                f"starts run from {self.starts[0]} to {self.starts[-1]}, not 0 to {len(self.ids)}"
            )
        if (np.diff(self.starts) < 0).any():
            raise ValueError("starts do not ascend")
        short = np.flatnonzero(self.lengths < 2)
        if short.size:
            i = int(short[0])
            raise DataError(
                f"example {i} has {self.lengths[i]} tokens; it needs one to read and one to predict"
            )
        silent = np.flatnonzero(self.loss_lengths == 0)
        if silent.size:
            raise DataError(f"example {int(silent[0])} has no token after its first that carries loss")
        if self.answers.dtype != np.int64 or self.answers.shape != (len(self), 2):
            raise ValueError(
                f"answers is {self.answers.dtype} {list(self.answers.shape)}; it must be int64 [{len(self)}, 2]"
            )
        first, last = self.answers.T
        if (first < 0).any() or (first > last).any() or (last >= self.lengths).any():
            raise ValueError("answers do not begin in their examples, the first before the last")

    @classmethod
    def of(
        cls, examples: Iterable[tuple[Tokens, Carries] | tuple[Tokens, Carries, Answers]], tokenizer: str
    ) -> "Examples":
        """Of (ids, carries) or (ids, carries, answers) each; `tokenizer` is the fingerprint of what made the ids.

        Without `answers`, runs of tokens that carry loss are the answers.

        Raises:
            DataError, ValueError: as the constructor.
        """
        parts, answers = [], []
        for i, (some, carry, *where) in enumerate(examples):
            ids, carries = np.asarray(some, np.int32), np.asarray(carry, bool)
            if ids.shape != carries.shape or ids.ndim != 1:
                raise ValueError(
                    f"example {i}: ids {list(ids.shape)} and carries {list(carries.shape)} differ"
                )
            parts.append((ids, carries))
            answers.append(where[0] if where else answers_of(carries, carries))
        starts = np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in parts)])
        carries = np.concatenate([np.zeros(0, bool), *(carries for _, carries in parts)])
        digest = hashlib.sha256(tokenizer.encode())
        for array in (starts, ids, carries):
            digest.update(np.ascontiguousarray(array).data)
        return cls(ids, carries, starts, np.array(answers, np.int64).reshape(-1, 2), digest.hexdigest())

    def __len__(self) -> int:
        """Examples."""
        return len(self.starts) - 1

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], carries bool [n]) of example i, views. Raises IndexError where there is none."""
        if not 0 <= i < len(self):
            raise IndexError(f"there is no example {i}; there are {len(self)}")
        part = slice(self.starts[i], self.starts[i + 1])
        return self.ids[part], self.carries[part]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.starts)

    @cached_property
    def loss_lengths(self) -> np.ndarray:
        """Targets of each example that carry loss, int64 [n]."""
        counted = np.concatenate([[0], np.cumsum(self.carries, dtype=np.int64)])
        return counted[self.starts[1:]] - counted[self.starts[:-1] + 1]

    @property
    def loss_tokens(self) -> int:
        """Targets that carry loss, over all examples."""
        return int(self.loss_lengths.sum())


def answers_of(said: np.ndarray, carries: np.ndarray) -> tuple[int, int]:
    """Where answers begin in an example: the first, and the last of which a token carries loss; (0, 0) for none.

    Args:
        said: bool [n], tokens that the assistant says; an answer is a run of them.
        carries: bool [n], those of them that carry loss.
    """
    begin = np.flatnonzero(np.diff(said, prepend=False) & said)
    carrying = np.flatnonzero(carries)
    if not carrying.size:
        return 0, 0
    return int(begin[0]), int(begin[begin <= carrying[-1]][-1])


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preferences: example i of `chosen` is to be preferred to example i of `rejected`; both begin with one prompt.

    Raises:
        DataError: the numbers of both differ.
    """

    chosen: Examples
    rejected: Examples

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.rejected):
            raise DataError(f"{len(self.chosen)} chosen answers have {len(self.rejected)} rejected ones")

    def __len__(self) -> int:
        """Pairs."""
        return len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """Of both sides, in their order."""
        return hashlib.sha256(f"{self.chosen.fingerprint} {self.rejected.fingerprint}".encode()).hexdigest()
