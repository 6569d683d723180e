"""What a model in training answers to held-out prompts: greedy, at every validation, shown and kept in samples.txt."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.cli import say
from experiments.tuning_data import TuneData, last_answer
from jaxlm.cli import readable
from jaxlm.config import InputError
from jaxlm.finetune.lora import generation_model
from jaxlm.generate import decode
from jaxlm.model import Split, abstract_model
from jaxlm.run_dir import RunDir
from jaxlm.sampling import Sampling
from jaxlm.sharding import BATCH_AXES
from jaxlm.text import stream_text
from jaxlm.train import cast_params
from jaxlm.tune_config import TuneRun

SHOWN = 300  # characters of a prompt or an answer on the terminal; samples.txt has all of it


def present_model(run: TuneRun, engine: Any) -> Split:
    """The model as it is trained now, in the dtype of the computation; with an adapter, factors beside the base."""
    params = cast_params(engine.params, jnp.dtype(run.train.dtype))
    if run.tune.adapter is None:
        return Split(abstract_model(run.model).graphdef, params)
    return generation_model(run, engine.frozen, params)


class Answers:
    """Call it at each checkpoint: where a validation was due, the prompts are answered."""

    def __init__(
        self,
        run: TuneRun,
        engine: Any,
        directory: RunDir,
        data: TuneData,
        n: int,
        longest: int,
        ends: tuple[int, ...],
    ):
        """n: prompts; longest: tokens of an answer at most; ends: ids that end one, beside the end of a turn.

        Prompts that leave no room for an answer are passed over.
        """
        self._run, self._engine, self._path = run, engine, directory.samples
        self._chat = data.chat
        longest = min(longest, run.model.context // 2)
        self.prompts: list[list[int]] = []
        self.expected: list[list[int]] = []
        for i in range(len(data.shown)):
            if len(self.prompts) == n or not longest:
                break
            prompt, answer = last_answer(*data.shown.example(i))
            if 0 < len(prompt) <= run.model.context - longest and prompt not in self.prompts:
                self.prompts.append(prompt)
                self.expected.append(answer)
        self._settings = Sampling(max_new_tokens=max(1, longest), greedy=True, stop=self._stop(ends))
        self._last = engine.step

    def _stop(self, ends: tuple[int, ...]) -> tuple[int, ...]:
        known = dict.fromkeys((self._chat.end, *ends))
        return tuple(i for i in known if i is not None and i < self._run.model.vocab_size)

    def __call__(self) -> None:
        """Answers, if a validation has just been and this step was not answered yet."""
        step, train = self._engine.step, self._run.train
        due = step % train.eval_interval == 0 or step == train.steps
        if not (self.prompts and due and step > self._last):
            return
        self._last = step
        try:
            texts = [self._text(ids) for ids in self.answer()]
        except InputError as error:
            say(f"warning: no sample answers: {error}")
            self.prompts = []
            return
        say("\n".join(self._lines(step, texts, SHOWN)))
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("\n".join(self._lines(step, texts, None)) + "\n\n")

    def answer(self) -> list[list[int]]:
        """Ids of the answer to each prompt."""
        model, mesh = present_model(self._run, self._engine), self._engine.mesh
        if mesh is None:
            return [answers[0].ids for answers in decode(model, self.prompts, self._settings)]
        # The rows of a batch are divided among the devices, so their number is filled up.
        more = -len(self.prompts) % math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        with jax.set_mesh(mesh):
            found = decode(model, [*self.prompts, *self.prompts[:1] * more], self._settings)
        return [answers[0].ids for answers in found[: len(self.prompts)]]

    def _text(self, ids: list[int]) -> str:
        return "".join(stream_text(self._chat.tokenizer, ids))

    def _lines(self, step: int, answers: list[str], most: int | None) -> list[str]:
        """most: characters of a text, its end for a prompt; None = all, with the line ends."""
        lines = [f"--- answers at step {step}"]
        for prompt, expected, answer in zip(self.prompts, self.expected, answers, strict=True):
            parts = {"prompt": self._text(prompt), "model": answer, "data": self._text(expected)}
            for name, text in parts.items():
                if most is not None:
                    text = text[-most:] if name == "prompt" else text[:most]
                    text = readable(text.replace("\n", "⏎"), width=4 * most)
                lines.append(f"{name}: {text}")
        return lines


def each(*callbacks: Callable[[], None] | None) -> Callable[[], None]:
    """One callback that calls all that there are."""

    def call() -> None:
        for callback in callbacks:
            if callback is not None:
                callback()

    return call
