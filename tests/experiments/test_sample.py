"""Sampling from the command line: the same text from every form of a model, whole characters, one-line errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from helpers import tiny  # noqa: E402

from convert.native import export_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import sample  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.config import ConfigError, InputError, RunConfig, TrainConfig, save  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402
from jaxlm.train import init_state  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "naïve 😀"
MODEL = tiny(n_layers=1, vocab_size=280, context=64, init="fan_in")  # 10 more ids than the tokenizer has


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of an untrained model, with two checkpoints of which the first is the best."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    directory = RunDir(path)
    config = RunConfig(MODEL, train=TrainConfig(seq_len=16))
    save(config, directory.config)
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(directory.tokenizer)
    checkpoints, state = Checkpoints(directory.checkpoints), init_state(config)
    checkpoints.save(1, state, {}, metric=1.0)
    checkpoints.save(2, state._replace(params={k: -v for k, v in state.params.items()}), {}, metric=2.0)
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    """The best weights of the run as a torchref checkpoint."""
    path = run.parent / "exported"
    export_torch(MODEL, open_target(run, "best").params, path)
    (path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    return path


def command(*args: object) -> list[str]:
    """The entry point as a user starts it."""
    return [sys.executable, "-m", "experiments.sample", *map(str, args)]


def test_streaming_never_breaks_a_character(run: Path) -> None:
    """Every byte is a token of its own here; pieces hold whole characters and join to what decode gives."""
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    text = "é😀 ab�漢字"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = list(sample.stream_text(tokenizer, ids))
    assert "".join(pieces) == text and all("�" not in piece or piece == "�" for piece in pieces)
    assert "😀" in pieces
    for cut in range(len(ids)):
        assert "".join(sample.stream_text(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])
    assert "".join(sample.stream_text(tokenizer, [270, *ids, 279])) == text


def test_run_and_checkpoint_continue_alike_in_both_frameworks(
    run: Path, checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Greedy text is one and the same; only prompt and continuation reach standard output; `best` is another model."""

    def text(*args: object) -> bytes:
        assert sample.main([*map(str, args), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "12"]) == 0
        return capfdbinary.readouterr().out

    best = text(run, "--checkpoint", "best")
    assert best.startswith(PROMPT.encode()) and best.endswith(b"\n") and len(best) > len(PROMPT.encode()) + 1
    assert text(run, "--checkpoint", "best", "--framework", "torch") == best
    assert text(checkpoint) == text(checkpoint, "--framework", "torch") == best
    assert text(run) != best


def test_a_run_trained_in_torch_is_a_target(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    """checkpoints-torch/latest is read where there is no orbax checkpoint, for both frameworks."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    (tmp_path / "checkpoints-torch").mkdir()
    (tmp_path / "checkpoints-torch" / "latest").symlink_to(checkpoint)
    target, expected = open_target(tmp_path), open_target(checkpoint)
    assert target.config == MODEL and target.run is not None and expected.run is None
    assert all((target.params[path] == value).all() for path, value in expected.params.items())
    weights = dict(expected.decoder.named_parameters())
    assert all(torch.equal(p, weights[path]) for path, p in target.decoder.named_parameters())


def test_a_prompt_from_standard_input(checkpoint: Path) -> None:
    """As a program in a pipe: text out, notes on standard error, the same seed gives the same text."""
    args = command(checkpoint, "--framework", "torch", "--seed", 3, "--max-new-tokens", 8)
    done = subprocess.run(args, input=f"{PROMPT}\n".encode(), capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT.encode()) and b"characters" in done.stderr
    assert done.stdout.decode("utf-8").count("\n") >= 1
    target = open_target(checkpoint)
    sampler = sample.Sampler(target, sample.SampleOptions("", max_new_tokens=8, seed=3, framework="torch"))
    assert done.stdout.decode("utf-8") == PROMPT + "".join(sampler.answer(PROMPT)) + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_dialogue_on_a_terminal(checkpoint: Path) -> None:
    """Commands change settings, a bad one is one line, Ctrl-C while nothing is answered exits with 130."""
    leader, terminal = os.openpty()
    # A test run in the background inherits an ignored SIGINT, and so would the program.
    heed = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = [sys.executable, "-c", f"{heed}; runpy.run_module('experiments.sample', run_name='__main__')"]
    args = [*start, str(checkpoint), "--framework", "torch", "--max-new-tokens", "4"]
    pipes = {"stdin": terminal, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, cwd=ROOT, text=True, encoding="utf-8", **pipes) as process:
        os.write(leader, b":t 0\n:t hot\n:k -1\n:nonsense\nab\n:seed 5\n")
        notes = ""
        while "seed = 5" not in notes:
            line = process.stderr.readline()
            assert line, notes
            notes += line
        assert process.stderr.read(2) == "> ", "it waits for the next line"
        process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    os.close(leader)
    os.close(terminal)
    assert process.returncode == 130
    assert output.startswith("ab") and output.endswith("\n")
    for expected in (
        "temperature = 0.0",
        ":t needs a number, got 'hot'",
        "top_k=-1",
        "unknown command :nonsense",
    ):
        assert expected in notes
    assert "Traceback" not in notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist"),
        ([], "has no config.json"),
        (["config.json"], "neither checkpoints nor model.safetensors"),
        (["config.json", "model.safetensors"], "has no tokenizer.json"),
    ],
)
def test_refuses_what_is_no_target(
    checkpoint: Path, tmp_path: Path, files: list[str] | None, message: str
) -> None:
    """One line that says what is missing."""
    path = tmp_path / "target"
    if files is not None:
        path.mkdir()
        for name in files:
            (path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(InputError, match=message) as caught:
        sample.main([str(path), "--prompt", "a"])
    assert "\n" not in str(caught.value)


def test_bad_input_is_one_line_and_exit_code_2(checkpoint: Path, run: Path, tmp_path: Path) -> None:
    """As a user sees it; and the same for settings, prompts and checkpoints that cannot work."""
    done = subprocess.run(
        command(tmp_path / "nothing"), input=b"", capture_output=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.count(b"\n") == 1 and b"does not exist" in done.stderr
    for args, message in (
        ([checkpoint, "--prompt", "a" * 60], "exceed the model's context of 64"),
        ([checkpoint, "--prompt", "a", "--temperature", "-1"], "temperature=-1"),
        ([checkpoint, "--prompt", "\udcff"], "not valid UTF-8"),
        ([checkpoint, "--promt", "a"], "--promt"),
        ([tmp_path, "--prompt", "a"], "has no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            sample.main([*map(str, args), "--framework", "torch"])
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="no complete checkpoint"):
        sample.main([str(tmp_path), "--prompt", "a"])


def test_an_empty_prompt_starts_a_document(checkpoint: Path) -> None:
    """It continues the separator of documents; without a separator it is refused."""
    target = open_target(checkpoint)
    sampler = sample.Sampler(target, sample.SampleOptions("", max_new_tokens=4, framework="torch"))
    assert "".join(sampler.answer(""))
    sampler.tokenizer.eos_id = None
    with pytest.raises(ConfigError, match="prompt is empty"):
        sampler.answer("")
