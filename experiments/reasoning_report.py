"""What experiments.reasoning leaves behind: reasoning.json, all replies, samples and the figure."""

import json
from pathlib import Path
from typing import Any

from experiments.cli import say
from experiments.reasoning_exam import Reply, is_right
from experiments.reasoning_sums import Sum, ask
from jaxlm.config import InputError
from jaxlm.disk import replace_text
from jaxlm.json_file import read_object
from jaxlm.plots import PlotError

BASE_AT_MOST, SFT_AT_LEAST, TOKENS_AT_MOST = 0.40, 0.90, 0.80
SHOWN = 4  # sums of each kind in samples.txt
FILE = "reasoning.json"
Replies = list[tuple[Sum, Reply]]


class Report:
    """The stages that are done, read from RUN/reasoning.json and written there one by one.

    Raises InputError where the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: list[dict[str, Any]] = []
        if (path / FILE).is_file():
            try:
                self.stages = list(read_object(path / FILE)["stages"])
                assert all(isinstance(stage["accuracy"], float) and stage["name"] for stage in self.stages)
            except (OSError, ValueError, KeyError, TypeError, AssertionError):
                raise InputError(
                    f"{path / FILE} is damaged; delete it, and the stages are examined again"
                ) from None

    def has(self, name: str) -> bool:
        """Whether a stage is done."""
        return any(stage["name"] == name for stage in self.stages)

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's marks."""
        return next(stage for stage in self.stages if stage["name"] == name)

    def add(self, name: str, marks: dict[str, Any], facts: dict[str, Any], replies: Replies) -> None:
        """A stage is done: marks and replies are written. facts: of the whole, such as what was checked."""
        self.stages.append({"name": name, **marks})
        folder = self.path / "replies"
        folder.mkdir(exist_ok=True)
        rows = [
            {
                "question": ask(p),
                "sum": p.answer,
                "right": is_right(p, r),
                "think_tokens": r.thought,
                "reply": r.text,
            }
            for p, r in replies
        ]
        replace_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self._sample(name, replies)
        replace_text(self.path / FILE, json.dumps({"stages": self.stages, **facts}, indent=1) + "\n")
        say(line(self.stages[-1]))

    def _sample(self, name: str, replies: Replies) -> None:
        """Some replies of each stage, after those of the stages before."""
        path, large = self.path / "samples.txt", self.stages[-1]["n"]
        shown = replies[:: max(1, large // SHOWN)][:SHOWN] + replies[large : large + SHOWN]
        lines = [f"--- {name}"]
        for problem, reply in shown:
            lines.append(
                f"{ask(problem)}\n    {reply.text!r}{'' if is_right(problem, reply) else '    (not right)'}"
            )
        before = path.read_text(encoding="utf-8") if path.is_file() and len(self.stages) > 1 else ""
        replace_text(path, before + "\n".join(lines) + "\n\n")

    def draw(self) -> None:
        """plots/reasoning.png, where there is matplotlib."""
        from jaxlm.plots_reasoning import plot_reasoning

        try:
            plot_reasoning(self.path)
        except PlotError as error:
            say(f"no figure: {error}")


def line(stage: dict[str, Any]) -> str:
    """A stage in a line."""
    return (
        f"{stage['name']:<5} {stage['accuracy']:7.1%} of {stage['n']:,} held-out sums right, "
        f"{stage['three_digit_accuracy']:7.1%} of {stage['three_digit_n']:,} of three digits, "
        f"{stage['mean_think_tokens']:5.1f} tokens of thought"
    )


def verdict(report: Report) -> tuple[list[str], bool]:
    """What came of it, line by line, and whether it is what should come of it."""
    base, sft, dpo = (report.stage(name) for name in ("base", "sft", "dpo"))
    kept = dpo["mean_think_tokens"] / max(sft["mean_think_tokens"], 1e-9)
    checks = [
        (
            base["accuracy"] <= BASE_AT_MOST,
            f"the base, never asked before, is right at most {BASE_AT_MOST:.0%} of the time",
        ),
        (sft["accuracy"] >= SFT_AT_LEAST, f"SFT is right at least {SFT_AT_LEAST:.0%} of the time"),
        (dpo["accuracy"] >= sft["accuracy"], "DPO is right no less often"),
        (kept <= TOKENS_AT_MOST, f"DPO thinks in {kept:.0%} of the tokens, at most {TOKENS_AT_MOST:.0%}"),
    ]
    lines = [line(stage) for stage in report.stages]
    lines.append(
        f"the base, of the same sums: {base['own_form_accuracy']:.1%} in the form that it has read, "
        f"{base['plain_question_said_anywhere']:.1%} asked in plain text, "
        f"{base['few_shot_said_anywhere']:.1%} asked after {base['few_shots']} answered questions"
    )
    lines += [f"  {'yes' if fine else 'NO':<4} {what}" for fine, what in checks]
    return lines, all(fine for fine, _ in checks)
