"""Sampling from the command line: the same text from every form of a model, whole characters, one-line errors."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402

from convert.native import export_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import sample  # noqa: E402
from experiments.cli import parse  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.config import ConfigError, InputError, RunConfig, TrainConfig, load, save  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402
from jaxlm.text import Completion  # noqa: E402
from jaxlm.tokenizer import PATTERN, Tokenizer  # noqa: E402
from jaxlm.train import init_state  # noqa: E402
from torchref.checkpoint import load_model, save_run  # noqa: E402
from torchref.train import init_state as torch_state  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "naïve 😀"
OPTIONS = functools.partial(sample.SampleOptions, "", framework="torch")
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
    trained = torch_state(load(RunConfig, run / "config.json"))
    trained.model.load_state_dict(load_model(checkpoint).state_dict())
    save_run(trained, tmp_path / "checkpoints-torch", {"loader": {}, "best": 2.0}, is_best=False)
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
    assert b"tokens/s" in done.stderr and done.stderr.count(b"\n") == 1
    sampler = sample.Sampler(open_target(checkpoint), OPTIONS(max_new_tokens=8, seed=3))
    assert done.stdout.decode() == PROMPT + "".join(sampler.answer(PROMPT)) + "\n"


def test_ctrl_c_exits_with_130(checkpoint: Path) -> None:
    """What was written stays, on a line of its own; no traceback."""
    heed = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; runpy.run_module('experiments.sample', run_name='__main__')"
    args = ["--framework", "torch", "--max-new-tokens", "4000", "--prompt", "ab"]
    (long := checkpoint.parent / "long").mkdir()
    longer = dataclasses.replace(MODEL, context=4096)
    export_torch(longer, random_params(longer, dtype="float32"), long)
    Tokenizer(PATTERN, {bytes([b]): b for b in range(256)}, {}).save(long / "tokenizer.json")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(long), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        begun = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        rest, notes = process.communicate(timeout=60)
    assert process.returncode == 130 and notes == b""
    assert begun.startswith(b"ab") and rest.endswith(b"\n") and len(rest) < 4000


def text_of(capfdbinary: pytest.CaptureFixture[bytes], *args: object) -> str:
    """Standard output of a call that ends well."""
    capfdbinary.readouterr()
    assert sample.main([*map(str, args)]) == 0
    return capfdbinary.readouterr().out.decode()


def test_several_prompts_are_a_batch(
    checkpoint: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """--prompt repeated, lines of a file and JSON say the same as one prompt at a time, in both frameworks."""
    (tmp_path / "lines.txt").write_bytes("ab\r\nnaïve 😀\nabcd abc\n".encode())
    prompts = ["ab", "naïve 😀", "abcd abc"]
    common = (checkpoint, "--max-new-tokens", 7, "--seed", 5)
    torch_ = (*common, "--framework", "torch")
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    batch = text_of(capfdbinary, *torch_, *given)
    assert text_of(capfdbinary, *torch_, "--file", tmp_path / "lines.txt", "--lines") == batch
    answers = batch.removesuffix("\n").split("\n---\n")
    assert [a.startswith(p) for a, p in zip(answers, prompts, strict=True)] == [True] * 3
    assert text_of(capfdbinary, *torch_, "--prompt", "ab") == answers[0] + "\n", "row 0 has the noise of one"

    greedy = (*given, "--greedy", "--json", "--logprobs")
    for words in (common, torch_):
        lines = [json.loads(x) for x in text_of(capfdbinary, *words, *greedy).splitlines()]
        assert [set(x) for x in lines] == [set(Completion._fields)] * 3
        assert [x["prompt"] for x in lines] == prompts
        for line in lines[: 3 if words is torch_ else 1]:
            alone = text_of(capfdbinary, *words, "--greedy", "--prompt", line["prompt"])
            assert line["prompt"] + line["text"] + "\n" == alone
        assert all(len(x["logprobs"]) == len(x["ids"]) <= 7 for x in lines)
        assert all(-50 < value <= 0 for x in lines for value in x["logprobs"])


def test_one_prompt_can_have_several_answers(
    checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """--samples draws different ones; beams come best first, streamed or not; a file is one prompt."""
    common = (checkpoint, "--framework", "torch", "--max-new-tokens", 5, "--prompt", "ab", "--json")
    drawn = [json.loads(x) for x in text_of(capfdbinary, *common, "--samples", 3).splitlines()]
    assert len({tuple(x["ids"]) for x in drawn}) == 3 and {x["score"] for x in drawn} == {0.0}
    beams = [
        json.loads(x) for x in text_of(capfdbinary, *common, "--num-beams", 3, "--samples", 2).splitlines()
    ]
    assert len(beams) == 2 and beams[0]["score"] > beams[1]["score"]
    best = text_of(capfdbinary, *common[:-1], "--num-beams", 3)
    assert best == "ab" + beams[0]["text"] + "\n"


def test_settings_reach_the_model(checkpoint: Path) -> None:
    """Each option is the setting of its name; what is left out is 0.8 and 40, and neutral where nothing is drawn."""
    target = open_target(checkpoint)

    def settings(*words: object) -> Sampling:
        options = parse(sample.SampleOptions, [str(checkpoint), *map(str, words)], "sample", "")
        return sample.Sampler(target, options).settings

    stop = settings().stop
    assert set(stop) == set(target.specials.eos)
    assert settings() == Sampling(temperature=0.8, top_k=40, stop=stop)
    assert settings("--greedy") == Sampling(greedy=True, stop=stop)
    assert settings("--num-beams", 4, "--early-stopping", "never", "--length-penalty", 0.6) == Sampling(
        num_beams=4, early_stopping="never", length_penalty=0.6, stop=stop
    )
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "no_repeat_ngram": 3,
        "samples": 2,
        "seed": 9,
        "max_new_tokens": 11,
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    newline = target.tokenizer.encode("\n")[0]
    assert settings(*words, "--stop-token", "<|pad|>", "--stop-token", "\n") == Sampling(
        **given, stop=(*stop, target.tokenizer.special_id("<|pad|>"), newline)
    )


def test_stop_strings_and_tokens_end_answers(
    checkpoint: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The answer without them, streamed and as a batch, in text and in ids; a file's text is one prompt."""
    (tmp_path / "prompt.txt").write_bytes(b"ab\nabc\n")
    prompt = "ab\nabc"
    common = (checkpoint, "--framework", "torch", "--greedy", "--max-new-tokens", 24, "--file")
    common = (*common, tmp_path / "prompt.txt")
    whole = text_of(capfdbinary, *common)
    assert whole.startswith(prompt)
    answer = whole.removeprefix(prompt).removesuffix("\n")
    stop = answer[3:5]
    kept = answer[: answer.find(stop)]
    assert text_of(capfdbinary, *common, "--stop", "never", "--stop", stop) == prompt + kept + "\n"
    cut = json.loads(text_of(capfdbinary, *common, "--stop", stop, "--json"))
    full = json.loads(text_of(capfdbinary, *common, "--json"))
    assert (cut["text"], cut["finish"]) == (kept, "stop") and cut["ids"] == full["ids"][: len(cut["ids"])]
    tokenizer = open_target(checkpoint).tokenizer
    piece = next(t for i in full["ids"] if len(tokenizer.encode(t := tokenizer.decode([i]))) == 1)
    ended = json.loads(text_of(capfdbinary, *common, "--stop-token", piece, "--json"))
    assert ended["ids"] == full["ids"][: full["ids"].index(tokenizer.encode(piece)[0])]


def test_chat_answers_a_turn(checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The prompt is written by the template, with the system message; only the answer comes out, its thought opened."""
    common = (checkpoint, "--framework", "torch", "--max-new-tokens", 5, "--greedy")
    sampler = sample.Sampler(open_target(checkpoint), OPTIONS(max_new_tokens=5, greedy=True))
    written = "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    said = "".join(sampler.answer(sampler.tokenizer.encode(written, special=True)))
    words = (*common, "--chat", "--system", "brief", "--prompt", "hi")
    assert text_of(capfdbinary, *words) == said + "\n"
    assert json.loads(text_of(capfdbinary, *words, "--json"))["text"] == said
    ids = sampler.tokenizer.encode(written + "<think>\n", special=True)
    thought = "<think>\n" + "".join(sampler.answer(ids)) + "\n"
    assert text_of(capfdbinary, *words, "--think") == thought
    two = text_of(capfdbinary, *words, "--think", "--prompt", "ho")
    assert two.startswith("hi\n" + thought + "---\nho\n<think>\n")


@pytest.mark.parametrize(
    ("framework", "kind", "limit"),
    [("torch", "bfloat16", 0.1), ("torch", "nf4", 1), ("jax", "int8", 0.1), ("jax", "float64", 1e-5)],
)
def test_precisions_and_quantised_weights(
    checkpoint: Path, framework: str, kind: str, limit: float, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """They are other weights than float32's, by about as much as they are coarser."""
    option = ("--quant", kind) if kind in ("nf4", "int8") else ("--dtype", kind)
    words = (checkpoint, "--max-new-tokens", 1, "--greedy", "--prompt", "ab", "--json", "--logprobs")
    exact = json.loads(text_of(capfdbinary, *words, "--framework", "torch"))
    other = json.loads(text_of(capfdbinary, *words, "--framework", framework, *option))
    assert 0 < abs(other["logprobs"][0] - exact["logprobs"][0]) < limit
    assert not jax.config.jax_enable_x64, "left as it was"


def test_bad_input_is_one_line_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    """As a user sees it: the message on standard error, nothing on standard output."""
    done = subprocess.run(
        command(tmp_path / "nothing"), input=b"a", capture_output=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.count(b"\n") == 1 and b"does not exist" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a" * 60], "exceed the model's context of 64"),
        (
            ["--prompt", "a" * 60, "--prompt", "a", "--max-new-tokens", "8"],
            "exceed the model's context of 64",
        ),
        (["--prompt", ""], r"prompt is empty: .*--unprompted"),
        (["--prompt", "a", "--prompt", ""], r"prompt is empty: .*--unprompted"),
        (["--prompt", "", "--chat"], "prompt is empty"),
        (["--prompt", "\udcff"], "prompt is not valid UTF-8"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1"),
        (["--prompt", "a", "--temperature", "0"], "temperature=0.0 .* above 0"),
        (["--prompt", "a", "--top-p", "0"], "top_p=0.0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["--prompt", "a", "--min-p", "-1"], "min_p=-1"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty=0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "a", "--samples", "2", "--greedy"], "samples=2"),
        (["--prompt", "a", "--num-beams", "2", "--temperature", "1"], "leave out --temperature"),
        (["--prompt", "a", "--num-beams", "2", "--top-k", "5"], "leave out --top-k"),
        (["--prompt", "a", "--num-beams", "2", "--top-p", "0.5"], "leave out --top-p"),
        (["--prompt", "a", "--num-beams", "2", "--samples", "3"], "samples=3"),
        (["--prompt", "a", "--stop-token", "<|im_ed|>"], r"'<\|im_ed\|>' \(did you mean '<\|im_end\|>'\?\)"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--logprobs"], "add --json"),
        (["--prompt", "a", "--system", "b"], "--system .* add --chat"),
        (["--prompt", "a", "--think"], "--think .* add --chat"),
        (["--prompt", "a", "--unprompted"], "--prompt and --unprompted both"),
        (["--unprompted", "--chat"], "leave one of the two out"),
        (["--prompt", "a", "--lines"], "not --prompt"),
        (["--promt", "a"], "--promt"),
        (["--file", "nothing.txt"], r"nothing\.txt cannot be read: No such file"),
        (["--file", "."], "cannot be read: Is a directory"),
        (["--file", ""], "--file '' names no file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(checkpoint: Path, words: list[str], message: str) -> None:
    """Settings, prompts and options that cannot work or contradict each other."""
    with pytest.raises(InputError, match=message) as caught:
        sample.main([str(checkpoint), "--framework", "torch", *words])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_prompts(checkpoint: Path, run: Path, tmp_path: Path) -> None:
    """Not UTF-8, empty, an empty line among lines; and a run whose checkpoint is not there."""
    for data, words, message in (
        (b"ab\xff\n", [], r"prompt\.txt is not UTF-8: .* at byte 2"),
        (b"\n", [], "prompt is empty"),
        (b"ab\n\ncd\n", ["--lines"], r"line 2 of .*prompt\.txt is empty"),
        (b"", ["--lines"], "line 1 of"),
    ):
        (tmp_path / "prompt.txt").write_bytes(data)
        with pytest.raises(InputError, match=message):
            sample.main(
                [str(checkpoint), "--framework", "torch", "--file", str(tmp_path / "prompt.txt"), *words]
            )
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="no complete checkpoint"):
        sample.main([str(tmp_path), "--prompt", "a"])


def test_line_ends_and_byte_order_marks_of_windows_are_no_part_of_a_prompt(tmp_path: Path) -> None:
    """One line end goes, whichever it is; a mark at the beginning too; what else is white stays."""
    path = tmp_path / "prompt.txt"
    for data, prompts in (
        (b"ab\r\n", ["ab"]),
        (b"\xef\xbb\xbfab\n\n", ["ab\n"]),
        (b" ab ", [" ab "]),
        (b"ab\rcd\r\n\r\n", ["ab\rcd\r\n"]),
    ):
        path.write_bytes(data)
        assert sample.read_prompts(OPTIONS(file=str(path))) == prompts
    path.write_bytes(b"\xef\xbb\xbfab\r\n\xef\xbb\xbfcd\r\n")
    assert sample.read_prompts(OPTIONS(file=str(path), lines=True)) == ["ab", "\ufeffcd"]


def test_closed_streams_are_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program without standard input or output has it; a prompt of its own needs no input."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="no standard input"):
        sample.main([str(checkpoint)])
    assert sample.read_prompts(OPTIONS(prompt=("a",))) == ["a"]
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ConfigError, match="no standard output"):
        sample.main([str(checkpoint), "--framework", "torch", "--prompt", "a", "--max-new-tokens", "1"])


def test_what_is_not_finite_is_null_in_json(
    checkpoint: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A model with NaN in it still gives valid JSON, and standard error says what is wrong."""
    params = random_params(MODEL, dtype="float32")
    params["blocks.0.attn.q_proj.weight"][:] = float("nan")
    export_torch(MODEL, params, tmp_path / "nan")
    (tmp_path / "nan" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    words = (
        "--framework",
        "torch",
        "--prompt",
        "a",
        "--greedy",
        "--max-new-tokens",
        "2",
        "--json",
        "--logprobs",
    )
    assert sample.main([str(tmp_path / "nan"), *words]) == 0
    done = capfdbinary.readouterr()
    assert json.loads(done.out, parse_constant=pytest.fail)["logprobs"] == [None, None]
    assert b"warning: the model gives NaN" in done.err
    assert b"warning" not in (sample.main([str(checkpoint), *words]), capfdbinary.readouterr().err)[1]


def test_the_rate_of_a_search_counts_all_of_its_time(
    checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Beams hand out all tokens at once, so there is no time to the first."""
    words = (str(checkpoint), "--framework", "torch", "--prompt", "a", "--max-new-tokens", "4")
    assert sample.main([*words, "--num-beams", "2"]) == 0
    assert b"the first after" not in capfdbinary.readouterr().err
    assert sample.main([*words, "--greedy"]) == 0
    assert b"the first after" in capfdbinary.readouterr().err


def test_without_a_prompt_a_document_begins(
    checkpoint: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """--unprompted continues the separator of documents; without a separator it is refused."""
    sampler = sample.Sampler(open_target(checkpoint), OPTIONS(max_new_tokens=4))
    eos = sampler.tokenizer.eos_id
    assert sampler.separator() == [eos]
    words = (checkpoint, "--unprompted", "--framework", "torch", "--max-new-tokens", 4)
    assert text_of(capfdbinary, *words) == "".join(sampler.answer([eos])) + "\n"
    assert json.loads(text_of(capfdbinary, *words, "--json"))["prompt"] == ""
    sampler.tokenizer.eos_id = None
    with pytest.raises(ConfigError, match="no token that separates documents"):
        sampler.separator()
