"""Evaluation from the command line: the numbers of the library, files that say everything, one-line errors."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from entry import Outcome, run, sentences  # noqa: E402
from helpers import random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert.native import build_torch, export_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import evaluate  # noqa: E402
from experiments.loading import load_model, precision  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.config import RunConfig, TrainConfig, save  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402
from jaxlm.train import init_state  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny(n_layers=1, vocab_size=280, context=24, init="fan_in", windows=(0,))
TEXT = "naïve 😀 " + sentences(4)
REPORT, FIGURE = "evaluation.json", "loss_by_position.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer of fewer ids than the model has."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    export_torch(MODEL, random_params(MODEL, dtype=np.float32), path)
    Tokenizer.train([TEXT] * 3, 270).save(path / "tokenizer.json")
    return path


@pytest.fixture
def call(model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`python -m experiments.evaluate MODEL ARGS`, in this process."""

    def start(*args: object, target: Path = model) -> Outcome:
        return run(evaluate.main, [str(target), *map(str, args)], capsys, monkeypatch)

    return start


def values(out: str) -> dict[str, float]:
    """The last line of a table."""
    return {
        name: float(value) for name, _, value in (word.partition("=") for word in out.split("\n")[-2].split())
    }


def plain(model: Path, text: str, window: int, stride: int) -> list[float]:
    """Float64 log-probabilities of a text after eos: one forward per token, all logits."""
    target = open_target(model)
    ids = [target.tokenizer.eos_id, *target.tokenizer.encode(text)]
    weights = {k: v.read().astype(np.float64) for k, v in target.contents.tensors.items()}
    decoder, found = build_torch(MODEL, weights), []
    for t in range(1, len(ids)):
        reach = window + stride * math.ceil(max(t - window, 0) / stride)  # of the first window that has t
        begin = max(min(reach, len(ids) - 1) - window, 0)
        with torch.no_grad():
            found.append(float(decoder(torch.tensor([ids[begin:t]]))[0][0, -1].log_softmax(-1)[ids[t]]))
    return found


def test_both_frameworks_give_the_plain_perplexity(model: Path, call) -> None:
    """float64 to rounding, whatever the batch; bits per byte are over the text's UTF-8 bytes."""
    expected = plain(model, TEXT, 16, 5)
    bits = -sum(expected) / math.log(2) / len(TEXT.encode())
    for args in (("jax", 3), ("torch", 8)):
        told = ("--text", TEXT, "--window", 16, "--stride", 5, "--dtype", "float64")
        result = call(*told, "--framework", args[0], "--batch-size", args[1])
        assert result.code == 0, result.err
        found = values(result.out)
        assert found["tokens"] == len(expected) and found["documents"] == 1
        # The line has ten digits.
        for name, value in (
            ("perplexity", math.exp(-sum(expected) / len(expected))),
            ("bits_per_byte", bits),
        ):
            assert abs(found[name] / value - 1) <= 1e-9
    assert not (model / "evaluation").exists(), "a model directory gets nothing unless told"


def test_the_report_says_everything(model: Path, call, tmp_path: Path) -> None:
    """Every option, version and document; the figure beside it; the loss by position sums to the total."""
    texts = [sentences(3), "x", sentences(5)[40:]]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "more.txt").write_text(TEXT, encoding="utf-8")
    out = tmp_path / "deep" / "out"
    args = ("--column", "body", "--front", "none", "--framework", "torch", "--dtype", "float64", "--out", out)
    result = call("--data", data, tmp_path / "more.txt", *args)
    assert result.code == 0, result.err
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    assert (out / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert report["options"]["window"] == 24 and report["options"]["stride"] == 12
    assert report["options"]["dtype"] == "float64" and report["front"] is None
    assert report["environment"]["versions"]["torch"] and set(report["data_sha256"]) == {
        str(data),
        str(tmp_path / "more.txt"),
    }
    documents, total = report["documents"], report["total"]
    assert [Path(d["name"]).name for d in documents] == [
        "texts.jsonl:1",
        "texts.jsonl:2",
        "texts.jsonl:3",
        "more.txt",
    ]
    tokens = [d["tokens"] for d in documents]
    assert tokens[1] == 0 and documents[1]["loss"] is None and documents[1]["unscored"] == 1
    assert total["tokens"] == sum(tokens) and total["unscored"] == 4
    mean = sum(d["loss"] * d["tokens"] for d in documents if d["tokens"]) / sum(tokens)
    assert abs(total["loss"] - mean) < 1e-12
    by = report["loss_by_position"]
    assert by["position"][0] == 1 and max(by["position"]) <= 24 and sum(by["tokens"]) == total["tokens"]
    assert abs(sum(n * x for n, x in zip(by["tokens"], by["loss"])) / sum(by["tokens"]) - mean) < 1e-12
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert abs(values(result.out)[name] / total[name] - 1) <= 1e-9


def test_a_run_gets_its_evaluation_inside(tmp_path: Path, call, model: Path) -> None:
    """From its checkpoint, in float32 as in bfloat16; --max-tokens ends early."""
    path = tmp_path / "tiny"
    path.mkdir()
    directory, config = RunDir(path), RunConfig(MODEL, train=TrainConfig(seq_len=16))
    save(config, directory.config)
    directory.tokenizer.write_bytes((model / "tokenizer.json").read_bytes())
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(1, init_state(config), {}, metric=1.0)
    checkpoints.close()
    whole = call("--text", "again and again", target=path)
    assert whole.code == 0, whole.err
    assert (path / "evaluation" / REPORT).is_file() and (path / "evaluation" / FIGURE).is_file()
    other = ("--framework", "torch", "--dtype", "bfloat16", "--out", tmp_path / "other")
    half = call("--text", "again and again", *other, target=path)
    losses = values(whole.out)["loss"], values(half.out)["loss"]
    assert losses[0] != losses[1] and abs(losses[1] / losses[0] - 1) < tolerance("bf16_llama_cpp")
    short = call("--text", TEXT, "again", "--max-tokens", 7, "--framework", "torch", target=path)
    assert values(short.out)["tokens"] == 7 and values(short.out)["documents"] == 1


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_model_is_loaded_alike_in_both_frameworks(model: Path, quant: str) -> None:
    """The same scores in float64, quantised from the masters or not; the target's own weights stay as they were."""
    target, ids, found = open_target(model), np.arange(60) % 280, []
    before = {name: p.clone() for name, p in target.decoder.named_parameters()}
    for framework in ("jax", "torch"):
        with precision(framework, "float64"):
            loaded = load_model(target, framework, "float64", quant)
            found.append(evaluate.scorer(framework)(loaded, [ids], 16, 8, 2).logprobs[0][1:])
    assert relative_error(*found) <= tolerance("f64_score")
    half = load_model(target, "torch", "bfloat16", quant)
    assert half.embed.weight.dtype == torch.bfloat16 and half.final_norm.weight.dtype == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in target.decoder.named_parameters())


def test_bad_input_is_one_line(model: Path, call, tmp_path: Path) -> None:
    """With the value that was wrong, and exit code 2; nothing on standard output."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"body": "abc"}\n', encoding="utf-8")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    larger = tmp_path / "larger"
    larger.mkdir()
    for name in ("config.json", "model.safetensors"):
        (larger / name).write_bytes((model / name).read_bytes())
    Tokenizer.train([TEXT] * 3, 300).save(larger / "tokenizer.json")
    cases: list[tuple[tuple[object, ...], str, Path]] = [
        ((), "give --data PATH … or --text TEXT", model),
        (("--text", "a", "--front", "none"), "nothing could be scored", model),
        (("--text", ""), "nothing could be scored", model),
        (("--data", tmp_path / "empty.txt"), "empty.txt is empty", model),
        (("--data", tmp_path / "none.txt"), "none.txt does not exist", model),
        (("--data", tmp_path / "rows.jsonl"), "no column 'text'", model),
        (("--data", ""), "--data '' names no file", model),
        (
            ("--text", "abc", "--window", 25),
            "--window 25 must be between 1 and the model's context of 24",
            model,
        ),
        (("--text", "abc", "--window", 0), "--window 0 must be", model),
        (
            ("--text", "abc", "--window", 8, "--stride", 9),
            "--stride 9 must be between 1 and the window of 8",
            model,
        ),
        (("--text", "abc", "--stride", 0), "--stride 0 must be", model),
        (("--text", "abc", "--batch-size", 0), "--batch-size 0 must be at least 1", model),
        (("--text", "abc", "--max-tokens", -1), "--max-tokens -1 must not be negative", model),
        (("--text", "a\udcff"), "--text 1 is not valid UTF-8", model),
        (("--text", "abc", "--out", tmp_path / "empty.txt"), "empty.txt is a file", model),
        (("--text", "abc", "--out", tmp_path / "empty.txt" / "deeper"), "empty.txt is a file", model),
        (("--text",), "give --data PATH … or --text TEXT", model),
        (("--text", "abc"), "has no tokenizer.json", bare),
        (("--text", "abc"), "outside the model's vocabulary of 280", larger),
        (("--text", "abc"), "does not exist", tmp_path / "nothing"),
    ]
    for args, message, target in cases:
        result = call(*args, "--framework", "torch", target=target)
        assert result.code == 2 and result.out == "", (args, result)
        assert message in result.err and result.err.count("\n") == 1, (args, result.err)


def test_options_may_be_repeated(call, tmp_path: Path) -> None:
    """Each --text and --data adds documents; none takes the place of another."""
    (tmp_path / "one.txt").write_text("The cat", encoding="utf-8")
    (tmp_path / "two.txt").write_text("The owl", encoding="utf-8")
    words = ("--text", "a", "b", "--data", tmp_path / "one.txt", "--text=-c", "--data", tmp_path / "two.txt")
    done = call(*words, "--framework", "torch", "--out", tmp_path)
    report = json.loads((tmp_path / REPORT).read_text())
    assert done.code == 0 and [Path(d["name"]).name for d in report["documents"]] == [
        "text 1",
        "text 2",
        "text 3",
        "one.txt",
        "two.txt",
    ]
    assert report["options"]["text"] == ["a", "b", "-c"] and len(report["data_sha256"]) == 2


def test_any_name_can_be_shown_in_any_encoding(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of ASCII, with a name of other letters, and more documents than are listed."""
    name = tmp_path / "naïve.txt"
    name.write_text("The cat", encoding="utf-8")
    texts = [word for i in range(6) for word in ("--text", f"The owl {i}")]
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        done = call(*texts, "--data", name, "--framework", "torch", "--out", tmp_path / "out")
    shown.flush()
    assert done.code == 0, done.err
    assert (
        b"documents=7" in shown.buffer.getvalue().splitlines()[-1] and b"\\u2026" in shown.buffer.getvalue()
    )
    assert json.loads((tmp_path / "out" / REPORT).read_text())["documents"][-1]["name"] == str(name)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_quantisation_is_shown_with_its_cost(call, model: Path, tmp_path: Path, framework: str) -> None:
    """Each weight's error is that of its dequantised values, and the perplexity beside it is bfloat16's own."""
    common = ("--text", TEXT, "--framework", framework, "--out", tmp_path)
    shown = call(*common, "--quant", "int4")
    assert shown.code == 0, shown.err
    report = json.loads((tmp_path / REPORT).read_text())
    weights = report["quantisation"]["weights"]
    names = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert {w["path"] for w in weights} == {f"blocks.0.{name}_proj.weight" for name in names}
    plain = open_target(model).contents.tensors
    for weight in weights:
        rows = plain[weight["path"]].read().astype(np.float64).T.reshape(-1)
        blocks = np.pad(rows, (0, -len(rows) % 64)).reshape(-1, 64)
        step = np.abs(blocks).max(1, keepdims=True) / 7
        rounded = (np.round(blocks / np.where(step == 0, 1, step)) * step).reshape(-1)[: len(rows)]
        expected = np.linalg.norm(rounded - rows) / np.linalg.norm(rows)
        assert abs(weight["error"] / expected - 1) < tolerance("f32_quant_error")
        assert weight["bytes_before"] == 4 * len(rows) > weight["bytes_after"]
    call("--text", TEXT, "--framework", framework, "--out", tmp_path / "half", "--dtype", "bfloat16")
    half = json.loads((tmp_path / "half" / REPORT).read_text())["total"]
    assert report["quantisation"]["bfloat16"]["perplexity"] == half["perplexity"]
    assert "perplexity" in shown.out and "blocks.0 (largest:" in shown.out
