"""What a model of experiments.reasoning can do: its replies to questions, marked; and the preferences made of them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.reasoning_sums import QUESTIONS, Style, Sum, ask, opening, reply
from jaxlm.chat import Chat
from jaxlm.generate import decode
from jaxlm.model import Split
from jaxlm.sampling import Sampling
from jaxlm.tokenizer import Tokenizer

THINK, ENOUGH = "<think>", "</think>"
BATCH = 350  # replies written side by side
SHOTS: tuple[tuple[Sum, Style], ...] = ((Sum(6, 7), "short"), (Sum(40, 5), "short"))
SHORTER = 0.8  # tokens of the chosen thought per token of the rejected one at most, where both are right
_NUMBER = re.compile(r"\d+")
_OWN = re.compile(r"= (\d+)\n")


class Reply(NamedTuple):
    """What a model wrote."""

    text: str
    thought: int  # tokens from <think> to </think>, or to the end where that is missing; 0 without <think>
    ended: bool  # by itself


@dataclass(frozen=True)
class Model:
    """A model that replies."""

    weights: Split
    tokenizer: Tokenizer
    longest: int  # tokens of a reply at most

    @functools.cached_property
    def chat(self) -> Chat:
        """How it is spoken to."""
        return Chat.of(self.tokenizer)

    def reply(self, prompts: Sequence[list[int]], samples: int = 1, seed: int = 0) -> list[list[Reply]]:
        """The greedy reply to each prompt, or several that are sampled from the model's own distribution."""
        ends = tuple(i for i in (self.chat.end, self.tokenizer.eos_id) if i is not None)
        settings = Sampling(self.longest, greedy=samples == 1, samples=samples, stop=ends)
        size = min(max(1, BATCH // samples), 1 << (len(prompts) - 1).bit_length())
        found = []
        for start in range(0, len(prompts), size):
            few = list(prompts[start : start + size])
            filled = few + few[:1] * (size - len(few))  # so that the last few rows are not compiled for anew
            answers = decode(self.weights, filled, dataclasses.replace(settings, seed=seed + start))
            found += [[self._read(a.ids, a.finish == "stop") for a in one] for one in answers[: len(few)]]
        return found

    def _read(self, ids: list[int], ended: bool) -> Reply:
        open_id, close_id = (self.tokenizer.special_id(text) for text in (THINK, ENOUGH))
        begin = ids.index(open_id) + 1 if open_id in ids else len(ids)
        end = ids.index(close_id, begin) if close_id in ids[begin:] else len(ids)
        return Reply(self.tokenizer.decode(ids), end - begin, ended)

    def asked(self, problem: Sum, form: int = 0, shots: Sequence[tuple[Sum, Style]] = ()) -> list[int]:
        """Ids of a question, perhaps after others with their answers."""
        messages = []
        for example, style in shots:
            messages += [
                {"role": "user", "content": ask(example, form)},
                {"role": "assistant", "content": reply(example, style)},
            ]
        return self.chat.encode([*messages, {"role": "user", "content": ask(problem, form)}])

    def begun(self, text: str) -> list[int]:
        """Ids of the beginning of a document, after the end of the one before."""
        front = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        return front + self.tokenizer.encode(text)


def is_right(problem: Sum, reply: Reply) -> bool:
    """Whether a reply ends by itself and is the sum and nothing else but the thought before it."""
    before, closed, after = reply.text.partition(ENOUGH)
    return reply.ended and (after if closed else before).strip() == str(problem.answer)


def is_said(problem: Sum, reply: Reply) -> bool:
    """Whether the sum stands anywhere in a reply, in whatever form: more than can be granted."""
    return str(problem.answer) in _NUMBER.findall(reply.text)


def is_worked(problem: Sum, reply: Reply) -> bool:
    """Whether the first result of a document is the sum."""
    return _OWN.findall(reply.text + "\n")[:1] == [str(problem.answer)]


def share(
    problems: Sequence[Sum], replies: Sequence[Reply], mark: Callable[[Sum, Reply], bool] = is_right
) -> float:
    """How many of the replies are right."""
    return sum(mark(p, r) for p, r in zip(problems, replies, strict=True)) / len(problems)


def examine(
    model: Model, problems: Sequence[Sum], larger: Sequence[Sum]
) -> tuple[dict[str, Any], list[Reply]]:
    """Marks of the greedy replies to held-out sums and to larger ones, and the replies to both.

    mean_think_tokens and the unmarked names are of the held-out sums.
    """
    replies = [one for (one,) in model.reply([model.asked(p) for p in (*problems, *larger)])]
    small, large = replies[: len(problems)], replies[len(problems) :]
    marks = {
        "accuracy": share(problems, small),
        "n": len(problems),
        "mean_think_tokens": sum(r.thought for r in small) / len(small),
        "three_digit_accuracy": share(larger, large),
        "three_digit_n": len(larger),
        "three_digit_mean_think_tokens": sum(r.thought for r in large) / len(large),
        "said_anywhere": share(problems, small, is_said),
        "ended": sum(r.ended for r in small) / len(small),
    }
    return marks, replies


def examine_base(model: Model, problems: Sequence[Sum]) -> dict[str, Any]:
    """What the base model knows of the same sums although nobody taught it to answer.

    own_form_accuracy: a document is begun like those that it has read, and its first result counts. The others count a
    sum wherever it stands in what is written. plain_question: the question as a line of text, without the tokens of a
    conversation. few_shot: as in the exam, but after other questions with their answers.
    """

    def written(prompts: list[list[int]]) -> list[Reply]:
        return [one for (one,) in model.reply(prompts)]

    own = written([model.begun(opening(p)) for p in problems])
    plain = written([model.begun(f"{ask(p)}\n") for p in problems])
    few = written([model.asked(p, shots=SHOTS) for p in problems])
    return {
        "own_form_accuracy": share(problems, own, is_worked),
        "plain_question_said_anywhere": share(problems, plain, is_said),
        "few_shots": len(SHOTS),
        "few_shot_said_anywhere": share(problems, few, is_said),
    }


def preferences(model: Model, problems: Sequence[Sum], samples: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of what the model itself says to each question, several times over; see `paired`."""
    forms = [number % len(QUESTIONS) for number in range(len(problems))]
    prompts = [model.asked(p, form) for p, form in zip(problems, forms, strict=True)]
    found = zip(problems, forms, model.reply(prompts, samples, seed), strict=True)
    return [pair for problem, form, replies in found for pair in paired(problem, ask(problem, form), replies)]


def paired(problem: Sum, question: str, replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Rows of preferences: the shortest right reply before a wrong one, and before a right one that thinks at length.

    The longest right reply is the worse one if its thought is longer by a quarter. Where no reply is right, the chosen
    one is written here instead, by short working; and a long one to reject where none even came to its end.
    """
    ended = [r for r in dict.fromkeys(replies) if r.ended and r.text.strip()]
    right = sorted((r for r in ended if is_right(problem, r) and r.thought), key=lambda r: r.thought)
    worse = [r.text for r in ended if not is_right(problem, r)][:1]
    if right and right[0].thought <= SHORTER * right[-1].thought:
        worse.append(right[-1].text)
    if not right and not worse:
        worse.append(reply(problem, "checked"))
    chosen = right[0].text if right else reply(problem, "short")
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": other}],
            "sampled": bool(right),
        }
        for other in worse
    ]
