"""How the tokens of an answer are chosen and when it ends: settings, checked; no jax, no torch.

The order is that of transformers' GenerationMixin: repetition, presence and frequency penalties, no-repeat n-grams,
then temperature, top-k, top-p, min-p. What computes it: jaxlm/logits.py, torchref/logits.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxlm.config import ConfigError, ModelConfig, nearest, require

EXTREME = 1e30  # of a setting: beyond it float32 has no room for what it makes of a logit
LARGEST_EXPONENT = 80.0  # e to this power is a number in float32


class Numbers(NamedTuple):
    """The continuous settings, None where one changes nothing; jaxlm traces them: a new value compiles nothing."""

    temperature: Any  # None = greedy
    tail: Any  # 1 - top_p, whose single-precision value is not one minus that of top_p
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any


class Answer(NamedTuple):
    """What a model wrote after a prompt."""

    ids: list[int]  # without the stop id
    logprobs: list[float]  # in nats, of each id under the model's own softmax; empty if not asked
    finish: Literal["stop", "length"]  # a stop id (or stop text) came, or max_new_tokens were made
    score: float  # beam search: sum of log-probabilities / length ** length_penalty; else 0


@dataclass(frozen=True)
class Sampling:
    """Settings of decoding. Definitions are transformers'; presence and frequency penalties are OpenAI's."""

    max_new_tokens: int = 64  # longest answer
    greedy: bool = False  # always the most likely token: what shapes or draws noise does not matter
    temperature: float = 1.0  # divides the logits; above 0
    top_k: int = 0  # choose among this many most likely tokens (and ties with the last of them); 0 = all
    top_p: float = 1.0  # choose among the fewest tokens whose probabilities sum to this; 1 = all
    min_p: float = 0.0  # choose among tokens at least this times as likely as the likeliest; 0 = all
    repetition_penalty: float = 1.0  # seen tokens' logits: divided by this if > 0, else multiplied
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer holds
    frequency_penalty: float = 0.0  # the same times how often the answer holds it
    no_repeat_ngram: int = 0  # no run of this many tokens occurs twice in prompt and answer; 0 = off
    num_beams: int = 1  # beam search over this many hypotheses; 1 = none
    length_penalty: float = 1.0  # beams: score = sum / length^this; above 0 favours long answers
    early_stopping: Literal["no", "yes", "never"] = (
        "no"  # beams: at num_beams answers; or by what is still possible
    )
    samples: int = 1  # answers per prompt
    logprobs: bool = False  # also give the log-probability of each token
    seed: int = 0  # of the noise; the same seed writes the same answers
    stop: tuple[int, ...] = ()  # ids that end an answer and are not part of it

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("top_k", "no_repeat_ngram"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative; 0 = off")
        require(
            1 / EXTREME <= self.temperature <= EXTREME,
            f"temperature={self.temperature} must be finite and above 0; greedy takes the most likely token",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1; 1 = all tokens")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be between 0 and 1; 0 = all tokens")
        require(
            1 / EXTREME <= self.repetition_penalty <= EXTREME,
            f"repetition_penalty={self.repetition_penalty} must be finite and above 0; 1 = none",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(abs(value) <= EXTREME, f"{name}={value} must be finite, at most {EXTREME:g} in size")
        require(
            abs(self.length_penalty) * math.log(self.max_new_tokens) < LARGEST_EXPONENT,
            f"length_penalty={self.length_penalty} must be finite, and {self.max_new_tokens} to its power too",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be between 0 and {2**32 - 1}")
        if self.num_beams > 1:
            self._check_beams()
        elif self.greedy:
            require(
                self.samples == 1,
                f"samples={self.samples} of one prompt would all be the same with greedy; ask for one",
            )

    def _check_beams(self) -> None:
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for name, value in neutral.items():
            require(
                getattr(self, name) == value,
                f"num_beams={self.num_beams} takes the likeliest answers, it does not sample: {name}="
                f"{getattr(self, name)} contradicts it; leave one of the two out",
            )
        require(
            self.samples <= self.num_beams,
            f"samples={self.samples} must not exceed num_beams={self.num_beams}: each beam gives one answer",
        )

    @property
    def numbers(self) -> Numbers:
        """What `process` needs of these settings."""
        greedy = self.greedy or self.num_beams > 1
        values = (
            None if greedy else self.temperature,
            None if greedy or self.top_p == 1 else 1 - self.top_p,
            None if greedy or self.min_p == 0 else self.min_p,
            None if self.repetition_penalty == 1 else self.repetition_penalty,
            None if self.presence_penalty == 0 else self.presence_penalty,
            None if self.frequency_penalty == 0 else self.frequency_penalty,
        )
        # A whole number or one of numpy's would be another type to trace, and compile everything again.
        return Numbers(*(None if value is None else float(value) for value in values))


def sampling(settings: dict[str, Any]) -> Sampling:
    """`Sampling(**settings)`. Raises ConfigError on a name that is no setting, with the nearest that is."""
    known = [f.name for f in dataclasses.fields(Sampling)]
    for name in settings:
        require(name in known, f"{name} is no setting of decoding{nearest(name, known)}")
    return Sampling(**settings)


def groups(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows that are decoded together: all, or those of one length where a bias table is indexed by slot."""
    if not config.attn_bias_table:
        return [list(range(len(prompts)))]
    lengths = sorted({len(p) for p in prompts})
    return [[row for row, p in enumerate(prompts) if len(p) == length] for length in lengths]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], slots: int) -> None:
    """Raises ConfigError where prompts are missing or wrong, or need more than the context or `slots`."""
    if not prompts:
        raise ConfigError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty; it needs at least one token")
        # A gather would clamp an id that is out of range, silently.
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ConfigError(f"prompt {row} holds id {wrong}, outside the vocabulary of {config.vocab_size}")
    longest = max(map(len, prompts))
    if max(longest, slots) > config.context:
        new, room = max(slots - longest, 0), max(config.context - longest, 0)
        fewer = f" or ask for at most {room} new tokens" if room else ""
        raise ConfigError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's context of {config.context}"
            f"; shorten the prompt{fewer}"
        )
    if slots < longest:
        raise ConfigError(f"slots={slots} are too few for a prompt of {longest} tokens")


def cut(ids: list[int], stop: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first stop id, and whether there is one."""
    end = next((i for i, token in enumerate(ids) if token in stop), None)
    return (ids, False) if end is None else (ids[:end], True)
