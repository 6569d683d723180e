"""`python -m experiments.train_tokenizer`: the same file every time, true figures, and one line for what cannot be."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("torch")

import tokenizers
from entry import Outcome, run
from helpers import tiny

from convert.checkpoints import CHECKPOINTS
from convert.targets import open_target
from experiments import sampler, train_tokenizer
from jaxlm.chat import LLAMA3, chatml
from jaxlm.config import RunConfig, TrainConfig, save
from jaxlm.data.corpus import is_validation
from jaxlm.run_dir import RunDir
from jaxlm.tokenizer import Tokenizer, open_tokenizer
from torchref.checkpoint import save_training
from torchref.train import init_state

pytestmark = pytest.mark.torch

LINES = [
    f"{n} the quick brown fox jumps over {n * 7} lazy dogs, naïve 你好 {'ab' * (n % 5)}\n" for n in range(200)
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl of 200 documents; one of them is empty, and is none."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"story": text} for text in [*LINES[:50], "", *LINES[50:]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """The entry point, as a user starts it."""

    def call(*words: object) -> Outcome:
        return run(train_tokenizer.main, [*map(str, words)], capsys, monkeypatch)

    return call


def facts(said: Outcome) -> dict[str, str]:
    """The line of NAME=VALUE."""
    return dict(pair.split("=") for pair in said.out.split())


@pytest.mark.parametrize(("kind", "template"), [("gpt4", "chatml"), ("tfm", "llama3")])
def test_the_same_corpus_gives_the_same_file_and_true_figures(
    corpus: Path, tmp_path: Path, train, kind: str, template: str
) -> None:
    """Byte for byte; what is said of it is what the library finds when it opens the file."""
    words = (corpus, "--column", "story", "--vocab-size", 500, "--kind", kind, "--template", template)
    said = [train(*words, "--out", tmp_path / name / "tokenizer.json") for name in ("a", "b")]
    assert [outcome.code for outcome in said] == [0, 0], said[0].err
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokenizer = open_tokenizer(tmp_path / "a")
    assert tokenizer.chat_template == {"chatml": chatml(), "llama3": LLAMA3}[template]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    tokens = sum(len(encoding.ids) for encoding in library.encode_batch(LINES))
    size = sum(len(text.encode()) for text in LINES)
    found = facts(said[0])
    assert (found["vocab_size"], found["documents"], found["bytes"]) == ("500", "200", str(size))
    assert float(found["bytes_per_token"]) == pytest.approx(size / tokens, abs=1e-4)
    assert int(found["unused"]) == sum("unused" in text for text in tokenizer.specials)
    assert found["fingerprint"] == tokenizer.fingerprint() == facts(said[1])["fingerprint"]
    changed = int(found["changed_texts"])
    assert changed == (200 if kind == "tfm" else 0)
    assert ("comes back as" in said[0].err) == ("warning: not every text" in said[0].err) == (kind == "tfm")
    end = "<|im_end|>" if template == "chatml" else "<|eot_id|>"
    assert tokenizer.special_id(end) and "Traceback" not in said[0].err


def test_limits_choose_documents(corpus: Path, tmp_path: Path, train) -> None:
    """What a preparation would hold out is not learned from; counts and megabytes stop at whole documents."""
    held_out = [text for i, text in enumerate(LINES) if not is_validation(i, 0.1)]
    size = sum(len(text.encode()) for text in LINES[:30])
    for words, texts in (
        (("--val-fraction", 0.1), held_out),
        (("--max-documents", 17), LINES[:17]),
        (("--max-mb", (size - 1) / 1e6), LINES[:30]),
        (("--val-fraction", 0.1, "--max-documents", 3), held_out[:3]),
    ):
        said = train(
            corpus, "--column", "story", "--vocab-size", 330, "--out", tmp_path, "--overwrite", *words
        )
        assert facts(said)["documents"] == str(len(texts)), said.err
        assert facts(said)["fingerprint"] == Tokenizer.train(texts, 330).fingerprint()


def test_a_run_with_this_tokenizer_chats_by_its_template(corpus: Path, tmp_path: Path, train) -> None:
    """`experiments.sample --chat` on the run: the stored template, and the end of its turns."""
    directory = RunDir(tmp_path / "run")
    directory.path.mkdir()
    words = ("--vocab-size", 400, "--template", "llama3", "--special", "<|x|>", "--out", directory.path)
    assert train(corpus, "--column", "story", *words).code == 0
    run = RunConfig(tiny(vocab_size=400, context=64), train=TrainConfig(seq_len=8))
    save(run, directory.config)
    save_training(init_state(run), directory.path / CHECKPOINTS["torch"] / "latest", {})
    options = sampler.SampleOptions(str(directory.path), chat=True)
    opened = sampler.Sampler(open_target(directory.path), options)
    tokenizer = opened.tokenizer
    hi = opened.chat.encode([{"role": "user", "content": " hi "}])
    header = [tokenizer.special_id(f"<|{name}_header_id|>") for name in ("start", "end")]
    assert opened.chat.template == LLAMA3 and tokenizer.special_id("<|x|>")
    assert hi[:2] == [tokenizer.bos_id, header[0]] and hi.count(header[1]) == 2
    assert tokenizer.decode(hi).endswith("hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert opened.chat.end in opened.settings.stop and opened.chat.end == tokenizer.special_id("<|eot_id|>")


def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, train) -> None:
    """What was wrong and what to do; nothing is written."""
    (tmp_path / "empty.jsonl").write_text('{"story": ""}\n')
    (tmp_path / "bad.jsonl").write_text('{"story": "a"}\nnot json\n')
    (tmp_path / "bad.jinja").write_text("{% if %}")
    (tmp_path / "there.json").write_text("{}")
    usual = ("--column", "story", "--vocab-size", 300)
    for words, message in (
        ((corpus, "--column", "story", "--vocab-size", 262), "vocab_size=262 is below 263, the 256 bytes"),
        (
            (corpus, *usual, "--kind", "gtp4"),
            "unknown kind 'gtp4' (did you mean 'gpt4'?); known are gpt4, tfm",
        ),
        ((corpus, "--vocab-size", 300, "--column", "stories"), "no column 'stories' (did you mean 'story'?)"),
        ((tmp_path / "empty.jsonl", *usual), "is empty: no text"),
        ((tmp_path / "bad.jsonl", *usual), "line 2 is not JSON"),
        ((tmp_path / "corpus.jsnl", *usual), "does not exist (did you mean 'corpus.jsonl'?)"),
        (
            (corpus, *usual, "--template", tmp_path / "bad.jinja"),
            "bad.jinja: the chat template is not valid Jinja",
        ),
        ((corpus, "--vocab-size", 10**12), "vocab_size=1000000000000 is above 1,048,576"),
        ((corpus, *usual, "--out", "/proc/none/new.json"), "/proc/none/new.json cannot be written: No such"),
        ((corpus, *usual, "--template", "lama3"), "did you mean 'llama3'?"),
        ((corpus, *usual, "--val-fraction", 1), "val_fraction=1.0 must be at least 0 and below 1"),
        ((corpus, *usual, "--max-documents", -1), "max_documents=-1 must not be negative"),
        ((corpus, *usual, "--out", tmp_path / "there.json"), "there.json is there already"),
    ):
        out = () if "--out" in words else ("--out", tmp_path / "new.json")
        said = train(*words, *out)
        last = said.err.strip().splitlines()[-1]
        assert said.code == 2 and last.startswith("error: ") and message in last, said.err
        assert said.err.count("error") == 1 and not (tmp_path / "new.json").exists()
