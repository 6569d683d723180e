"""The way from worked sums to short right reasoning: what is held out stays out, every stage shows what it should."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from entry import Outcome, run

from experiments import reasoning
from experiments.reasoning_data import DataFolder, Sizes
from experiments.reasoning_exam import Reply, is_right, paired
from experiments.reasoning_sums import QUESTIONS, Sum, ask, held_out, leaks, problems, reply, thought, worked
from jaxlm.data.corpus import DataError

STYLES = ("short", "long", "checked")
FEW = Sizes(documents=600, conversations=200)
# A decoder that learns nothing in so few steps: the way is walked, not what comes of it.
TINY = {
    "model.d-model": 32,
    "model.n-layers": 1,
    "model.n-heads": 2,
    "model.n-kv-heads": 1,
    "model.head-dim": 16,
    "model.d-ff": 32,
    "steps.base": 3,
    "steps.sft": 2,
    "steps.dpo": 2,
    "sizes.held-out": 12,
    "sizes.three-digit": 4,
    "sizes.documents": 200,
    "sizes.conversations": 60,
    "sizes.asked": 8,
    "sizes.samples": 2,
    "sizes.reply-tokens": 12,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Data as the stages read it, fewer of them."""
    data = DataFolder(tmp_path_factory.mktemp("reasoning") / "data", FEW, 0)
    data.make(336)
    return data


def rows(path: Path) -> list[dict]:
    """Rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked_for(data: DataFolder) -> Iterator[tuple[int, int]]:
    """The two numbers that each text of the data asks for, read off its first line."""
    texts = [row["text"] for row in rows(data.documents)]
    texts += [row["messages"][0]["content"] for row in rows(data.conversations)]
    texts += [ask(problem) for problem in data.asked()]
    for text in texts:
        a, b = re.findall(r"[0-9]+", text.splitlines()[0])
        yield int(a), int(b)


def test_every_step_of_a_working_is_true_and_the_answer_right() -> None:
    """Each equation of each style holds by Python's own sum, and its last digits spell the answer."""
    for problem in itertools.islice(problems("some", frozenset()), 400):
        for style in STYLES:
            text = thought(problem, style)
            steps = re.findall(r"([\d+]+)=(\d+)", text)
            assert steps and all(sum(map(int, left.split("+"))) == int(right) for left, right in steps), text
            first = steps[: max(len(str(n)) for n in problem)]
            *_, top = results = [right for _, right in first]
            assert top + "".join(r[-1] for r in reversed(results[:-1])) == str(sum(problem)), text
            assert worked(problem, style).endswith(f"\n= {sum(problem)}\n")
            assert reply(problem, style) == f"<think>{text}</think>{sum(problem)}"


def test_what_is_held_out_occurs_in_no_stage_in_either_order(made: DataFolder) -> None:
    """No text asks for a pair of the exam, judged apart from the check, which passes too; others come in both."""
    small, large = held_out(FEW.held_out, FEW.three_digit, 0)
    assert (len(small), len(large)) == (700, 200)
    assert all(10 <= a <= b <= 99 for a, b in small) and all(100 <= a <= b <= 999 for a, b in large)
    asked = set(asked_for(made))
    assert not {pair for a, b in small | large for pair in ((a, b), (b, a))} & asked
    assert {a < b for a, b in asked if min(a, b) >= 10 and max(a, b) <= 99} == {True, False}
    assert made.check() == {"pretrain.jsonl": 600, "sft.jsonl": 200}
    exam = [tuple(sorted(p)) for p in (*made.exam()[0], *made.exam()[1])]
    assert sorted(exam) == sorted(small | large)


@pytest.mark.parametrize("swapped", [False, True], ids=["as-asked", "exchanged"])
@pytest.mark.parametrize("name", ["pretrain.jsonl", "sft.jsonl", "preferences.jsonl"])
def test_a_held_out_sum_in_any_file_is_refused(
    made: DataFolder, tmp_path: Path, name: str, swapped: bool
) -> None:
    """Planted into one line of a stage's data, in either order, it stops the run and the line is named."""
    data = DataFolder(Path(shutil.copytree(made.path, tmp_path / "data")), FEW, 0)
    problem = made.exam()[0][5]
    problem = Sum(problem.b, problem.a) if swapped else problem
    for form in range(len(QUESTIONS)):
        user, said = {"role": "user", "content": ask(problem, form)}, {"role": "assistant", "content": "1"}
        row = {
            "pretrain.jsonl": {"text": worked(problem, "short")},
            "sft.jsonl": {"messages": [user, said]},
            "preferences.jsonl": {"prompt": [user], "chosen": [said], "rejected": [said]},
        }[name]
        before = (made.path / name).read_text().splitlines()[:3] if name != "preferences.jsonl" else []
        (data.path / name).write_text("\n".join([*before, json.dumps(row)]) + "\n")
        with pytest.raises(DataError, match=rf"{name}, line {len(before) + 1}: holds a sum that is held out"):
            data.check()


def test_sums_within_a_working_are_no_false_alarm() -> None:
    """Results that stand beside each other are no question: with every pair held out, one-digit workings pass."""
    every = frozenset(itertools.combinations_with_replacement(range(10, 1000), 2))
    found = problems("few digits", frozenset(), {(1, 1): 1.0})
    texts = [worked(p, style) for p in itertools.islice(found, 100) for style in STYLES]
    assert leaks(texts, every) == []


def test_digits_are_single_tokens(made: DataFolder) -> None:
    """Every number is as many tokens as it has digits, alone and in a question."""
    tokenizer = made.tokenizer
    assert all(len(tokenizer.encode(str(n))) == len(str(n)) for n in range(2_000))
    for problem in made.exam()[0][:50]:
        tokens = [tokenizer.decode([i]) for i in tokenizer.encode(worked(problem, "checked"))]
        assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))
    assert tokenizer.encode("<think></think>", special=True) == [
        tokenizer.special_id("<think>"),
        tokenizer.special_id("</think>"),
    ]


@pytest.mark.parametrize(
    ("text", "ended", "right"),
    [
        pytest.param("<think>7+8=15, 4+5+1=10</think>105", True, True, id="with-thought"),
        pytest.param("105", True, True, id="without"),
        pytest.param("<think>7+8=15, 4+5+1=10</think>1051", True, False, id="more-digits"),
        pytest.param("<think>105</think>15", True, False, id="only-thought-of"),
        pytest.param("<think>7+8=15</think>5</think>105", True, False, id="two-ends"),
        pytest.param("<think>105", True, False, id="never-ended-thought"),
        pytest.param("<think>7+8=15, 4+5+1=10</think>105", False, False, id="cut-off"),
        pytest.param("", True, False, id="nothing"),
    ],
)
def test_a_reply_is_right_only_as_a_whole(text: str, ended: bool, right: bool) -> None:
    """Exact match of what stands behind the thought, of a reply that ended by itself."""
    assert is_right(Sum(47, 58), Reply(text, 0, ended)) is right


def test_pairs_prefer_the_shortest_right_reply() -> None:
    """To the longest right one and to a wrong one, never to one cut off; what was never right gets its working."""
    problem = Sum(47, 58)
    short, long = (Reply(reply(problem, style), n, True) for style, n in (("short", 16), ("checked", 62)))
    wrong, cut = Reply("<think>7+8=15</think>15", 6, True), Reply("<think>7+8", 3, False)

    def made_of(*replies: Reply) -> list[tuple[str, str, bool]]:
        found = paired(problem, "?", replies)
        return [(p["chosen"][0]["content"], p["rejected"][0]["content"], p["sampled"]) for p in found]

    assert made_of(long, cut, short, wrong) == [(short.text, wrong.text, True), (short.text, long.text, True)]
    assert made_of(short, short._replace(text=f"{short.text} ", thought=17), cut) == []
    assert made_of(wrong, cut) == [(short.text, wrong.text, False)]
    assert made_of(cut) == [(short.text, long.text, False)]


def words(directory: Path, *more: str) -> list[str]:
    """A command line of the tiny way."""
    tiny = (word for name, value in TINY.items() for word in (f"--{name}", str(value)))
    return ["--run-dir", str(directory), *tiny, *more]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, reasoning.Report]:
    """The whole way on a tiny scale."""
    path = tmp_path_factory.mktemp("walked") / "run"
    options = reasoning.parse(reasoning.ReasoningOptions, words(path), "reasoning", "")
    report = reasoning.reasoning(options)
    assert report is not None
    return path, report


def test_the_way_leaves_three_runs_and_an_account(walked: tuple[Path, reasoning.Report]) -> None:
    """Stages, marks of all held-out sums, replies to recount them, run directories, samples and the figure."""
    path, _ = walked
    found = json.loads((path / "reasoning.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["base", "sft", "dpo"]
    assert found["texts_without_held_out_sums"]["preferences.jsonl"] >= 8
    for stage in found["stages"]:
        assert (stage["n"], stage["three_digit_n"]) == (12, 4)
        replies = rows(path / "replies" / f"{stage['name']}.jsonl")
        assert stage["accuracy"] == sum(r["right"] for r in replies[:12]) / 12
        assert stage["mean_think_tokens"] == sum(r["think_tokens"] for r in replies[:12]) / 12
        assert (path / stage["name"] / "config.json").is_file()
        assert (path / stage["name"] / "metrics.jsonl").is_file()
    assert {"own_form_accuracy", "few_shot_said_anywhere", "plain_question_said_anywhere"} <= found["stages"][
        0
    ].keys()
    assert re.findall(r"^--- (\w+)$", (path / "samples.txt").read_text(), re.M) == ["base", "sft", "dpo"]
    assert (path / "plots" / "reasoning.png").stat().st_size > 10_000
    stored = json.loads((path / "dpo" / "config.json").read_text())["tune"]
    assert (
        stored["adapter"]["rank"] == 16
        and stored["base"] == str(path / "sft")
        and stored["dpo"]["reference"] == "auto"
    )


def again(
    directory: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *more: str
) -> Outcome:
    """The command once more, in the same directory."""
    return run(reasoning.main, words(directory, *more), capsys, monkeypatch)


def test_finished_stages_are_not_repeated(
    walked: tuple[Path, reasoning.Report],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--resume does what is missing and leaves the rest; the exit code tells that too little was learned."""
    path = Path(shutil.copytree(walked[0], tmp_path / "run"))
    before = (path / "reasoning.json").read_bytes()
    told = again(path, capsys, monkeypatch, "--resume")
    assert told.code == 1 and "NO   SFT is right at least 90%" in told.out
    assert [f"{name} is done already" in told.err for name in reasoning.STAGES] == [True] * 3
    assert (path / "reasoning.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param([], "continue it with --resume", id="there-already"),
        pytest.param(["--resume", "--seed", "1"], "was begun with another --seed", id="another-seed"),
        pytest.param(["--resume", "--steps.sft", "9"], "was begun with another --steps", id="other-steps"),
        pytest.param(["--sizes.held-out", "4000"], "at most half", id="too-many-held-out"),
        pytest.param(["--model.vocab-size", "300"], "must be at least 320", id="few-ids"),
        pytest.param(["--model.context", "128"], "must be at least 140", id="short-context"),
        pytest.param(["--steps.dpo", "0"], "steps.dpo=0 must be positive", id="no-steps"),
    ],
)
def test_bad_input_is_one_line(
    walked: tuple[Path, reasoning.Report],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    """Exit code 2, one line on standard error, nothing changed."""
    before = sorted(p.stat().st_mtime_ns for p in walked[0].rglob("*"))
    told = again(walked[0], capsys, monkeypatch, *more)
    assert told.code == 2 and message in told.err and told.err.count("\n") == 1, told.err
    assert sorted(p.stat().st_mtime_ns for p in walked[0].rglob("*")) == before


@pytest.mark.slow
def test_short_right_reasoning_is_learned(tmp_path: Path) -> None:
    """The whole way: the base at most 40 %, SFT at least 90 %, DPO no lower with a fifth fewer tokens of thought."""
    report = reasoning.reasoning(reasoning.ReasoningOptions(str(tmp_path / "run")))
    assert report is not None
    base, sft, dpo = report.stages
    assert base["n"] == sft["n"] == dpo["n"] == 700
    assert base["accuracy"] <= 0.40 and base["own_form_accuracy"] >= 0.50  # it can add, and was never asked
    assert sft["accuracy"] >= 0.90 and sft["mean_think_tokens"] > 20
    assert dpo["accuracy"] >= sft["accuracy"]
    assert dpo["mean_think_tokens"] <= 0.8 * sft["mean_think_tokens"]
