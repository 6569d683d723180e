"""Supervised fine-tuning from the command line: it learns, resumes bitwise, exports, and refuses what is wrong."""

import contextlib
import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from entry import Outcome, run
from helpers import tiny
from tuning_files import CONTEXT, exported, turn, write_base, write_chats, write_rows

from convert.adapters import write_run_adapter
from convert.targets import open_target
from experiments import sft
from experiments.cli import main_guard
from experiments.tuning_data import last_answer, open_data
from experiments.tuning_options import (
    DpoOptions,
    LoraOptions,
    SftOptions,
    parse_options,
    run_of,
)
from jaxlm.adapter_config import AdapterConfig
from jaxlm.config import TrainConfig
from jaxlm.finetune.lora import adapted
from jaxlm.metrics import read_metrics
from jaxlm.tensor_file import open_file
from jaxlm.tune_config import ChatConfig, TuneConfig, TuneRun, load_run

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    *("--train.plots", "False", "--train.batch-size", "8", "--optim.lr", "2e-2", "--train.remat", "none"),
    *("--sample-tokens", "4", "--samples", "1", "--train.eval-every", "6", "--log.details", "False"),
]
LORA = ["--lora.rank", "3", "--lora.dropout", "0.1", "--quant", "nf4"]
Call = Callable[..., Outcome]


class Whole(NamedTuple):
    """A run of 12 steps."""

    words: list[str]  # of its command line, without steps and directory
    path: Path
    err: str


Runs = Callable[[str], Whole]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base")
    return exported(write_base(folder / "ours"), folder / "tiny")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations."""
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture
def call(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls experiments.sft with words."""
    return lambda *words: run(sft.main, [str(word) for word in words], capsys, monkeypatch)


@pytest.fixture(scope="module")
def runs(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Makes a run once: of `all` weights, unpacked; or of an adapter (`lora`) with dropout on a base in nf4."""

    @functools.cache
    def made(name: str) -> Whole:
        path = tmp_path_factory.mktemp(name) / "run"
        more = LORA if name == "lora" else ["--chat.packing", "False"]
        words = [str(base), "--data", str(chats), *QUICK, *more, "--optim.warmup-steps", "2"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
            patch.setattr(sys, "argv", ["prog", *words, "--train.steps", "12", "--run-dir", str(path)])
            with pytest.raises(SystemExit) as stop:
                main_guard(sft.main)
        assert not stop.value.code, said.getvalue()
        return Whole(words, path, said.getvalue())

    return made


BOTH = pytest.mark.parametrize("name", ["all", "lora"])


@BOTH
def test_it_learns_and_leaves_what_it_is_to_leave(runs: Runs, name: str) -> None:
    """The loss falls; data, a marked example, what is trained and the way out are said; the directory is complete."""
    whole, is_lora = runs(name), name == "lora"
    rows = read_metrics(whole.path / "metrics.jsonl")
    assert [row["step"] for row in rows if "val_loss" in row] == [6, 12]
    assert rows[-1]["val_loss"] < rows[0]["loss"] / 1.15
    said = ["48 examples", "carry loss", "⟦", "to validate on", "--to hf"]
    said += ["parameters of an adapter", "nf4", "--to peft"] if is_lora else ["trained: all"]
    assert [text for text in said if text not in whole.err] == []
    names = ["env.json", "tokenizer.json", "checkpoints", "source/tokenizer_config.json"]
    names += ["adapter/adapter.json"] if is_lora else []
    assert [name for name in names if not (whole.path / name).exists()] == []
    stored = load_run(whole.path / "config.json")
    assert isinstance(stored, TuneRun) and stored.tune.base == whole.words[0]
    text = (whole.path / "samples.txt").read_text(encoding="utf-8")
    assert text.count("--- answers at step") == 2 and "say" in text


@pytest.mark.parametrize("name", ["lora", pytest.param("all", marks=pytest.mark.slow)])
def test_resume_is_bitwise(call: Call, runs: Runs, tmp_path: Path, name: str) -> None:
    """6 steps and 6 more give the losses, the weights and the adapter of 12 at once."""
    whole = runs(name)
    for steps, again in ((6, []), (12, ["--resume"])):
        decay = ["--optim.decay-steps", 12, "--train.steps", steps, "--run-dir", tmp_path / "run"]
        done = call(*whole.words, *decay, *again)
        assert done.code == 0, done.err
    places = (tmp_path / "run", whole.path)
    logs = [read_metrics(where / "metrics.jsonl") for where in places]
    assert [row["step"] for row in logs[0]] == list(range(1, 13))
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert [row.get(key) for row in logs[0]] == [row.get(key) for row in logs[1]], key
    ends = [open_target(where).contents.tensors for where in places]
    assert all(np.array_equal(ends[0][path].read(), ends[1][path].read()) for path in ends[0])
    if name == "lora":
        factors = [open_file(where / "adapter" / "adapter.safetensors") for where in places]
        assert all(np.array_equal(factors[0][path].read(), factors[1][path].read()) for path in factors[0])


@BOTH
def test_what_comes_of_it_is_exported(base: Path, runs: Runs, tmp_path: Path, name: str) -> None:
    """To Hugging Face, bit for bit, with the files that the base came with; of an adapter, what it adapts has moved."""
    whole = runs(name)
    out = exported(whole.path, tmp_path / "hf")
    mine, theirs, before = (open_target(path).contents.tensors for path in (whole.path, out, base))
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[path].read(), theirs[path].read()) for path in mine)
    kept = [(path / "tokenizer_config.json").read_text(encoding="utf-8") for path in (base, out)]
    assert json.loads(kept[0]) == json.loads(kept[1])
    moved = {path for path in mine if not np.array_equal(mine[path].read(), before[path].read())}
    if name == "lora":
        factors = open_file(whole.path / "adapter" / "adapter.safetensors")
        assert {path.rpartition(".")[0] for path in factors} == moved
    else:
        assert moved == set(mine)


def test_an_adapter_is_merged_into_the_base(call: Call, runs: Runs, tmp_path: Path) -> None:
    """--adapter: a second stage starts where the first one ended."""
    whole = runs("lora")
    last = read_metrics(whole.path / "metrics.jsonl")[-1]
    words = [*whole.words, "--adapter", whole.path / "adapter", "--train.steps", 1]
    done = call(*words, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(first["val_loss"] - last["val_loss"]) < 0.2  # of nf4, which rounds the merged weights anew


@pytest.mark.slow
def test_more_epochs_go_on(call: Call, base: Path, chats: Path, tmp_path: Path) -> None:
    """--epochs says on resume how far in all; warmup and schedule stay those of the first start."""
    words = [base, "--data", chats, *QUICK, "--warmup-ratio", 0.5, "--run-dir", tmp_path / "run"]
    words += ["--chat.packing", "False", "--samples", 0]
    assert call(*words, "--epochs", 1).code == 0
    done = call(*words, "--epochs", 1.5, "--resume")
    assert done.code == 0 and "resumed at step" in done.err, done.err
    first, then = read_metrics(tmp_path / "run" / "metrics.jsonl"), load_run(tmp_path / "run" / "config.json")
    assert len(first) == then.train.steps > then.optim.decay_steps
    assert then.optim.warmup_steps == -(-then.optim.decay_steps // 2)


def test_what_is_not_said_follows_from_the_data() -> None:
    """Steps from epochs, warmup from its ratio, the learning rate and its floor from the method, T from the model."""
    model = tiny(context=5000)

    def made(options: SftOptions | DpoOptions) -> TuneRun:
        return run_of(options, model, lambda epochs: round(100 * epochs))

    data = ("a.jsonl",)
    run = made(SftOptions("base", data=data))
    assert (run.train.steps, run.optim.warmup_steps, run.train.seq_len) == (300, 9, 2048)
    assert (run.optim.lr, run.tune.epochs, run.tune.adapter) == (2e-5, 3.0, None)
    assert run.optim.min_lr == pytest.approx(2e-6)
    lora = made(SftOptions("base", data=data, lora=LoraOptions(8))).tune.adapter
    assert lora is not None and (lora.rank, lora.alpha) == (8, 16.0)
    assert made(SftOptions("base", data=data, lora=LoraOptions(8))).optim.lr == 2e-4
    assert made(DpoOptions("base", data=data)).optim.lr == 5e-7
    assert made(DpoOptions("base", data=data, lora=LoraOptions(8))).train.steps == 100
    words = [
        "base",
        "--data",
        "a.jsonl",
        "--train.steps",
        "7",
        "--optim.min-lr",
        "0",
        "--optim.warmup-steps",
        "0",
    ]
    run = made(parse_options(SftOptions, words, "sft", ""))
    assert (run.train.steps, run.tune.epochs, run.optim.min_lr, run.optim.warmup_steps) == (7, 0.0, 0.0, 0)


def test_the_last_answer_is_cut_off() -> None:
    """Of several turns the last, with its end and without what follows it."""
    ids, carries = np.arange(10), np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
    assert last_answer(ids, carries) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])


@pytest.mark.parametrize("think", [True, False])
def test_a_sample_begins_with_the_thought(base: Path, tmp_path: Path, think: bool) -> None:
    """The prompt ends where the assistant begins to speak, whether or not what it thinks carries loss."""
    said = ["<think>one</think> cat", "<think>two</think> dog"]
    rows = [{"messages": [*turn("cat", said[0]), *turn("dog", said[1])]}, {"messages": turn("cat", said[0])}]
    data = str(write_rows(tmp_path / "chats.jsonl", rows))
    options = SftOptions(str(base), data=(data,), val=(data,), chat=ChatConfig(think=think))
    held = open_data(options, open_target(base), 200)
    decode = held.chat.tokenizer.decode
    for i, (asked, thought) in enumerate((("dog", "two"), ("cat", "one"))):
        prompt, answer = (decode(ids) for ids in last_answer(*held.shown.example(i)))
        assert prompt.endswith(f"{asked}<|im_end|>\n<|im_start|>assistant\n")
        assert answer == f"<think>{thought}</think> {asked}<|im_end|>"


GOOD = {"messages": turn("cat")}
BAD_ROWS = {
    "no assistant": ({"messages": turn("cat")[:1]}, ["assistant"]),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}, *turn("cat")]}, ["robot"]),
    "empty answer": ({"messages": turn("cat", "")}, ["empty"]),
    "not a conversation": ({"messages": 3}, ["messages"]),
    "a preference": ({"prompt": turn("cat")[:1], "chosen": "a", "rejected": "b"}, []),
    "not JSON": ("{", []),
    "too long": ({"messages": turn("cat", "dog " * CONTEXT)}, ["tokens"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_line_with_its_place(call: Call, base: Path, tmp_path: Path, name: str) -> None:
    """Exit code 2, one line, the file and the line of the row; nothing is left behind."""
    row, said = BAD_ROWS[name]
    data = write_rows(tmp_path / "chats.jsonl", [GOOD, GOOD, row, GOOD])
    words = ["--data", data, *QUICK, "--chat.too-long", "refuse", "--run-dir", tmp_path / "run"]
    done = call(base, *words)
    assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    assert "chats.jsonl" in done.err and "line 3" in done.err, done.err
    assert all(word in done.err for word in said), done.err
    assert not (tmp_path / "run").exists()


BAD_WORDS = {
    "no data": ([], ["--data"]),
    "missing file": (["--data", "none.jsonl"], ["none.jsonl"]),
    "empty file": (["--data", "{tmp}/empty.jsonl"], ["empty.jsonl"]),
    "one row": (["--data", "{tmp}/one.jsonl"], ["--val"]),
    "seq_len": (["--data", "{chats}", "--train.seq-len", str(CONTEXT + 1)], [f"context of {CONTEXT}"]),
    "targets": (["--data", "{chats}", "--lora.rank", "2", "--lora.targets", ".*q_porj.*"], ["q_proj"]),
    "alpha alone": (["--data", "{chats}", "--lora.alpha", "8"], ["--lora.rank"]),
    "quant alone": (["--data", "{chats}", "--quant", "nf4"], ["--lora.rank"]),
    "dropout of experts": (["--data", "{chats}", "--lora.dropout", "2", "--lora.rank", "1"], ["dropout"]),
    "policy": (["--data", "{chats}", "--optim.policy", "nothing:lr=2"], ["nothing"]),
    "template name": (["--data", "{chats}", "--chat.template", "chatlm"], ["chatml"]),
    "template tokens": (["--data", "{chats}", "--chat.template", "llama3"], ["<|eot_id|>"]),
    "template error": (["--data", "{chats}", "--chat.template", "{tmp}/bad.jinja"], ["bad.jinja"]),
    "template refuses": (
        ["--data", "{chats}", "--chat.template", "{tmp}/raises.jinja"],
        ["line 1", "no system"],
    ),
    "another base": (["--data", "{chats}", "--adapter", "{tmp}/adapter"], ["adapter"]),
    "no adapter": (["--data", "{chats}", "--adapter", "{tmp}"], ["adapter"]),
    "epochs": (["--data", "{chats}", "--epochs", "0"], ["--epochs"]),
    "warmup": (["--data", "{chats}", "--warmup-ratio", "2"], ["--warmup-ratio"]),
    "val fraction": (["--data", "{chats}", "--val-fraction", "1"], ["--val-fraction"]),
    "accumulation": (["--data", "{chats}", "--train.accumulation", "3"], ["accumulation"]),
    "option": (["--data", "{chats}", "--lora.rnk", "3"], ["--lora.rank"]),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Path:
    """Files that cannot be used, and an adapter of another model."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "one.jsonl", [GOOD])
    (folder / "bad.jinja").write_text("{% for %}")
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    says = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    (folder / "raises.jinja").write_text(refuses + says)
    other = open_target(write_base(folder / "other", {"d_ff": 16}))
    adapter = AdapterConfig(1, 1.0)
    run = TuneRun(
        other.config, train=TrainConfig(seq_len=8), tune=TuneConfig("sft", "other", adapter=adapter)
    )
    factors = {name: np.zeros(like.shape, like.dtype) for name, like in adapted(run).shapes.items()}
    write_run_adapter(run, factors, other, folder / "adapter")
    return folder


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_input_is_one_line(
    call: Call, base: Path, chats: Path, odd: Path, tmp_path: Path, name: str
) -> None:
    """Exit code 2 and a line that names what is wrong; nothing is left behind."""
    words, said = BAD_WORDS[name]
    filled = [word.format(tmp=odd, chats=chats) if "{" in word else word for word in words]
    done = call(base, *filled, *QUICK, "--run-dir", tmp_path / "run")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in done.err for word in said), done.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(call: Call, base: Path, chats: Path, tmp_path: Path) -> None:
    """Before anything is read: a directory that holds a run is continued or left alone."""
    (tmp_path / "config.json").write_text("{}")
    done = call(base, "--data", chats, *QUICK, "--run-dir", tmp_path)
    assert done.code == 2 and "--resume" in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.slow
def test_a_process_says_the_same(base: Path, tmp_path: Path) -> None:
    """As its users start it: one line and exit code 2."""
    command = [sys.executable, "-m", "experiments.sft", str(base), "--data", "none.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
