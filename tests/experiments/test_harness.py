"""Tasks of lm_eval through our adapter against lm_eval's own HFLM on the same weights, without a network."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from entry import Outcome, run, sentences  # noqa: E402
from helpers import random_params, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import hf  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import harness  # noqa: E402
from jaxlm.config import ConfigError, InputError  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny(n_layers=1, vocab_size=280, context=24, init="fan_in")
TEXT = sentences(6)
TASKS = ("tiny_choice", "tiny_rolling", "tiny_answer")
ROWS: dict[str, list[dict[str, Any]]] = {
    "tiny_choice": [
        # The last context is longer than the model reads; one is empty, one ends in a space.
        {"question": q, "choices": [" sees", " owl 3.", " the", " likes the dog"], "answer": i % 4}
        for i, q in enumerate(["The cat", "The dog ", "owl", "The fox finds the", "", TEXT])
    ],
    "tiny_rolling": [{"text": TEXT}, {"text": "The cat"}, {"text": "naïve 😀\n" + TEXT[:40]}],
    "tiny_answer": [{"question": q, "answer": "the cat"} for q in ("The cat", "The owl likes the", TEXT)],
}
FORMS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


class Bench(NamedTuple):
    """A Hugging Face directory, and one with tasks."""

    model: Path
    tasks: Path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Random weights and a tokenizer; task files with local data."""
    root = tmp_path_factory.mktemp("harness")
    model, tasks = root / "model", root / "tasks"
    model.mkdir(), tasks.mkdir()
    weights = random_params(MODEL, dtype=np.float32)
    tokenizer = Tokenizer.train([TEXT] * 3, MODEL.vocab_size)
    hf.write(model, MODEL, {k: Lazy.of(v) for k, v in weights.items()}, family="llama", tokenizer=tokenizer)
    for name, rows in ROWS.items():
        data = tasks / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        form = FORMS[name] | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(root / "cache")},
            "test_split": "test",
        }
        (tasks / f"{name}.yaml").write_text(json.dumps(form), encoding="utf-8")
    return Bench(model, tasks)


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """What a model answered to each request of each task, in order."""
    return {name: [sample["resps"] for sample in rows] for name, rows in results["samples"].items()}


@pytest.fixture
def call(bench: Bench, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`python -m experiments.harness MODEL ARGS` in PyTorch, in this process."""

    def start(*args: object) -> Outcome:
        told = [str(bench.model), "--framework", "torch", *map(str, args)]
        return run(harness.main, told, capsys, monkeypatch)

    return start


def adapter(bench: Bench, **changes: Any) -> Any:
    """Our model for lm_eval, in PyTorch."""
    pytest.importorskip("lm_eval")
    from experiments.harness_lm import JaxlmLM

    target = open_target(bench.model)
    arguments = {"prefix": target.specials.bos, "batch_size": 2} | changes
    return JaxlmLM(target.decoder, "torch", target.config, target.tokenizer, target.specials, **arguments)


def asked(kind: Any, *arguments: Any) -> list[Any]:
    """Requests of lm_eval."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_likelihoods_are_those_of_a_plain_forward(bench: Bench) -> None:
    """One row, no padding: of a continuation after a context, after none, and of one that is cut on the left."""
    model = adapter(bench)
    decoder, encode = model.model, model.tokenizer.encode
    pairs = [("The cat", " sees"), ("", "The"), (TEXT, " the owl")]
    for pair, (logprob, greedy) in zip(pairs, model.loglikelihood(asked("loglikelihood", *pairs))):
        context = encode(pair[0]) or [model.prefix]
        ids = (context + encode(pair[1]))[-(MODEL.context + 1) :]
        n = len(encode(pair[1]))
        with torch.no_grad():
            logprobs = decoder(torch.tensor([ids[:-1]]))[0][0, -n:].double().log_softmax(-1)
        expected = float(logprobs[torch.arange(n), ids[-n:]].sum())
        assert abs(logprob / expected - 1) <= tolerance("f32_hflm")
        assert greedy == (logprobs.argmax(-1).tolist() == ids[-n:])
    best = int(decoder(torch.tensor([encode("The cat")]))[0][0, -1].argmax())
    text = model.tokenizer.decode([best])
    if encode("The cat" + text) == [*encode("The cat"), best]:
        assert model.loglikelihood(asked("loglikelihood", ("The cat", text)))[0][1] is True


def test_sampling_depends_on_the_seed_and_the_request(bench: Bench) -> None:
    """The same seed writes the same; requests of one context differ, in and across batches."""
    told = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    requests = asked("generate_until", *[("The cat", told)] * 3)
    first = adapter(bench).generate_until(requests)
    assert first == adapter(bench).generate_until(requests)
    assert len(set(first)) == 3 and first != adapter(bench, seed=7).generate_until(requests)


def test_refuses_what_cannot_be_computed(bench: Bench) -> None:
    """One line each, with what was wrong."""
    model = adapter(bench)
    for told, message in (
        ({"max_gen_toks": 24}, "answers of 24 tokens leave no room for a context in the 24"),
        ({"typical_p": 0.5}, "typical_p cannot be had"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.generate_until(asked("generate_until", ("The cat", told)))
    with pytest.raises(ConfigError, match="a continuation of .* tokens does not fit the 24 read at once"):
        model.loglikelihood(asked("loglikelihood", ("The", TEXT)))
    with pytest.raises(ConfigError, match="max_length=25 must be between 2 and the context of 24"):
        adapter(bench, max_length=25)
    with pytest.raises(ConfigError, match="needs a token before a text"):
        adapter(bench, prefix=None)


def test_a_model_that_gives_nan_gets_no_results(bench: Bench) -> None:
    """NaN is the largest of all choices to numpy: such a model would have answered all like the first."""
    model = adapter(bench)
    torch.nn.init.constant_(model.model.final_norm.weight, float("nan"))
    with pytest.raises(InputError, match="the model gives NaN"):
        model.loglikelihood(asked("loglikelihood", ("The cat", " sees")))
    with pytest.raises(InputError, match="the model gives NaN"):
        model.loglikelihood_rolling(asked("loglikelihood_rolling", ("The cat",)))


def test_bad_options_are_one_line(
    bench: Bench, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the value that was wrong, or the extra to install, and exit code 2; nothing on standard output."""
    (tmp_path / "half.yaml").write_text("task: half\n", encoding="utf-8")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--tasks", "tiny_choice", "--limit", 0), "--limit 0 must be at least 1"),
        (("--tasks", "tiny_choice", "--batch-size", 0), "--batch-size 0 must be at least 1"),
        (("--tasks", "tiny_choice", "--num-fewshot", -1), "--num-fewshot -1 must not be negative"),
        (("--tasks", "a", "--include-path", tmp_path / "none"), "none is no directory"),
        (("--limit", 1), "tasks"),
        (("--tasks", "tiny_choice", "--out", tmp_path), f"--out {tmp_path} is a directory"),
    ]
    if importlib.util.find_spec("lm_eval"):
        cases.append((("--tasks", "half", "--include-path", tmp_path), f"half of {tmp_path}: "))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")  # the entry sets them for its process
    monkeypatch.setitem(os.environ, "HF_DATASETS_OFFLINE", "1")
    for args, message in cases:
        result = call(*args)
        assert result.code == 2 and result.out == "", (args, result)
        assert message in result.err.splitlines()[-1], (args, result.err)
        assert "Traceback" not in result.err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = call("--tasks", "tiny_choice")
    assert result.code == 2 and "pip install 'jaxlm[eval]'" in result.err and result.err.count("\n") == 1


@pytest.mark.slow
def test_an_unknown_task_is_one_line(bench: Bench, call) -> None:
    """With the nearest name, after lm_eval's own tasks were searched too."""
    pytest.importorskip("lm_eval")
    result = call("--tasks", "tiny_chioce", "--include-path", bench.tasks)
    assert result.code == 2 and "no task 'tiny_chioce'" in result.err and "tiny_choice" in result.err


@pytest.mark.slow
def test_every_task_gives_what_hflm_gives(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods in float32 noise, the same choices, metrics and generations, in both frameworks; contexts that are
    empty or too long, texts of several windows, answers cut at a stop string.
    """
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(bench.tasks), include_defaults=False)
    oracle = HFLM(pretrained=str(bench.model), device="cpu", dtype="float32", batch_size=2)
    assert oracle.max_length == MODEL.context
    expected = simple_evaluate(oracle, tasks=list(TASKS), task_manager=manager, log_samples=True)
    assert expected is not None
    for framework, batch in (("jax", 8), ("torch", 3)):
        out = tmp_path / f"{framework}.json"
        args = [str(bench.model), "--tasks", *TASKS, "--include-path", str(bench.tasks), "--front", "bos"]
        more = ["--framework", framework, "--batch-size", str(batch), "--samples", "--out", str(out)]
        outcome = run(harness.main, [*args, *more], capsys, monkeypatch)
        assert outcome.code == 0, outcome.err
        assert all(name in outcome.out for name in TASKS)
        results = json.loads(out.read_text(encoding="utf-8"))
        assert results["jaxlm"]["options"]["framework"] == framework
        found, wanted = answers(results), answers(expected)
        assert found["tiny_answer"] == wanted["tiny_answer"]
        assert any(text for [[text]] in found["tiny_answer"]), "a generation is not empty"
        for name in ("tiny_choice", "tiny_rolling"):
            ours, theirs = (_flat(values[name]) for values in (found, wanted))
            assert len(ours) == len(theirs) > 0
            assert [x for x in ours if isinstance(x, str)] == [x for x in theirs if isinstance(x, str)]
            numbers = [(float(a), float(b)) for a, b in zip(ours, theirs) if not isinstance(a, str)]
            assert max(abs(a - b) / max(abs(b), 1) for a, b in numbers) <= tolerance("f32_hflm")
        for name in TASKS:
            for metric, value in expected["results"][name].items():
                if isinstance(value, float):
                    assert abs(results["results"][name][metric] / value - 1 if value else value) <= tolerance(
                        "f32_hflm"
                    ), (name, metric)


def _flat(values: Any) -> list[Any]:
    """Numbers as float, everything else as text, out of nested lists."""
    if isinstance(values, list | tuple):
        return [x for value in values for x in _flat(value)]
    text = isinstance(values, str) and values not in ("True", "False")
    return [str(values) if isinstance(values, bool) or text or values in ("True", "False") else float(values)]
