"""Sums worked by digits: problems, texts, questions with thoughts, and proof that what is held out occurs nowhere.

    47 + 58
    ones: 7+8=15, write 5, carry 1. tens: 4+5+1=10, write 0, carry 1. hundreds: 1.
    = 105

The working never adds anything but single digits, so a sum of two-digit numbers stands in a text only where it is asked
for, and there both numbers stand in one clause: `leaks` finds them, whatever words or signs are between them.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

TWO_DIGIT = 4095  # unordered pairs of two-digit numbers, doubles among them
PLACES = ("ones", "tens", "hundreds", "thousands")
QUESTIONS = ("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?")
Style = Literal["short", "long", "checked"]
# Of what the base reads: the digits of the two numbers, and how often.
MIXTURE = {(1, 1): 0.05, (2, 1): 0.10, (1, 2): 0.10, (2, 2): 0.40, (3, 2): 0.05, (2, 3): 0.05, (3, 3): 0.25}
# Of thoughts that are taught: most are long, so that there is something to shorten.
THOUGHTS: dict[Style, float] = {"short": 0.3, "long": 0.25, "checked": 0.45}
_NEXT = re.compile(r"(\d+)(?=[^\d=.,:<\n]+(\d+))")  # a number and the next one of the same clause


class Sum(NamedTuple):
    """A problem."""

    a: int
    b: int

    @property
    def answer(self) -> int:
        """What it comes to."""
        return self.a + self.b

    @property
    def pair(self) -> tuple[int, int]:
        """The two numbers, whichever comes first."""
        return min(self), max(self)


Pairs = frozenset[tuple[int, int]]  # unordered, the smaller first


def held_out(n: int, larger: int, seed: int) -> tuple[Pairs, Pairs]:
    """`n` of the unordered pairs of two-digit numbers, and `larger` of the pairs of three-digit numbers."""
    rng = random.Random(f"held out {seed}")
    every = list(itertools.combinations_with_replacement(range(10, 100), 2))
    big: set[tuple[int, int]] = set()
    while len(big) < larger:
        big.add(Sum(rng.randrange(100, 1000), rng.randrange(100, 1000)).pair)
    return frozenset(rng.sample(every, n)), frozenset(big)


def questions(pairs: Pairs, seed: int) -> list[Sum]:
    """Each pair once, in one of its orders; the same ones every time."""
    rng = random.Random(f"questions {seed}")
    return [Sum(*rng.sample(pair, 2)) for pair in sorted(pairs)]


def problems(seed: str, kept_out: Pairs, digits: dict[tuple[int, int], float] = MIXTURE) -> Iterator[Sum]:
    """Sums without end, never one that is held out. digits: of the first and the second number, and their shares."""
    rng = random.Random(seed)
    kinds, weights = list(digits), list(digits.values())
    while True:
        made = Sum(
            *(rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in rng.choices(kinds, weights)[0])
        )
        if made.pair not in kept_out:
            yield made


def columns(problem: Sum) -> list[tuple[int, int, int]]:
    """(digit of a, digit of b, carry into it) of each place, the ones first; as many as the longer number has."""
    a, b, carry, found = *problem, 0, []
    while not found or a or b:
        found.append((a % 10, b % 10, carry))
        a, b, carry = a // 10, b // 10, sum(found[-1]) // 10
    return found


def thought(problem: Sum, style: Style) -> str:
    """The working of a sum: digits alone, or in words, or in words and once more with the numbers exchanged."""
    if style == "short":
        return ", ".join(_added(*column) for column in columns(problem))
    said = []
    places = columns(problem)
    for place, column in zip(PLACES, places, strict=False):
        ten, one = divmod(sum(column), 10)
        carried = f", carry {ten}" if ten else ""
        said.append(f"{place}: {_added(*column)}, write {one}{carried}.")
        if ten and column is places[-1]:
            said.append(f"{PLACES[len(places)]}: write {ten}.")
    if style == "checked":
        again = thought(Sum(problem.b, problem.a), "short")
        said.append(f"Check: {again}.")
    return " ".join(said)


def _added(a: int, b: int, carry: int) -> str:
    return f"{a}+{b}{f'+{carry}' if carry else ''}={a + b + carry}"


def worked(problem: Sum, style: Style) -> str:
    """A document of the base model: no question, no chat."""
    return f"{opening(problem)}{thought(problem, style)}\n= {problem.answer}\n"


def opening(problem: Sum) -> str:
    """How a document of the base model begins."""
    return f"{problem.a} + {problem.b}\n"


def documents(n: int, seed: int, kept_out: Pairs) -> list[str]:
    """What the base model reads: worked sums in every style."""
    rng = random.Random(f"styles {seed}")
    found = itertools.islice(problems(f"documents {seed}", kept_out), n)
    return [worked(problem, rng.choice(tuple(THOUGHTS))) for problem in found]


def reply(problem: Sum, style: Style) -> str:
    """An answer with its thought."""
    return f"<think>{thought(problem, style)}</think>{problem.answer}"


def conversations(n: int, seed: int, kept_out: Pairs) -> list[list[dict[str, str]]]:
    """What supervised fine-tuning shows: a question, an answer with its thought."""
    rng = random.Random(f"conversations {seed}")
    kinds, weights = list(THOUGHTS), list(THOUGHTS.values())
    return [
        [
            {"role": "user", "content": ask(problem, rng.randrange(len(QUESTIONS)))},
            {"role": "assistant", "content": reply(problem, rng.choices(kinds, weights)[0])},
        ]
        for problem in itertools.islice(problems(f"taught {seed}", kept_out), n)
    ]


def ask(problem: Sum, form: int = 0) -> str:
    """A question; form 0 is the one that every stage is examined with."""
    return QUESTIONS[form].format(a=problem.a, b=problem.b)


def leaks(texts: Iterable[str], kept_out: Pairs) -> list[str]:
    """The texts in which a held-out pair stands: two numbers of one clause, one after the other, joined by anything."""
    return [text for text in texts if not kept_out.isdisjoint(neighbours(text))]


def neighbours(text: str) -> Iterator[tuple[int, int]]:
    """Every two numbers that follow each other within a clause, the smaller first."""
    for found in _NEXT.findall(text):
        first, second = sorted(map(int, found))
        yield first, second
