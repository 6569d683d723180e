"""`experiments.sample --adapter`: one adapter merged, several by name on one base, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from entry import run as call  # noqa: E402
from helpers import random_params, tiny  # noqa: E402

from convert import adapters  # noqa: E402
from convert.native import export_torch  # noqa: E402
from convert.targets import open_target  # noqa: E402
from experiments import sample  # noqa: E402
from experiments.dialogue import Dialogue  # noqa: E402
from experiments.sampler import SampleOptions, Sampler  # noqa: E402
from jaxlm.adapter_config import AdapterConfig, factor_shapes  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402

pytestmark = pytest.mark.torch

MODEL = tiny(init="fan_in", n_layers=1, vocab_size=300)
WORDS = ["--prompt", "ab", "--greedy", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a torchref checkpoint with a tokenizer; one, two: adapters of different rank on it."""
    root = tmp_path_factory.mktemp("sampled")
    params = random_params(MODEL, dtype=np.float32)
    export_torch(MODEL, params, root / "base")
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(root / "base" / "tokenizer.json")
    known = open_target(root / "base").facts
    for seed, name in enumerate(("one", "two"), 1):
        config, random, factors = AdapterConfig(seed, 4.0), np.random.default_rng(seed), {}
        for path in filter(config.adapts, params):
            for slot, shape in zip(
                ("lora_a", "lora_b"), factor_shapes(params[path].shape, seed), strict=True
            ):
                factors[f"{path}.{slot}"] = random.normal(size=shape).astype(np.float32) * 0.3
        facts = adapters.AdapterFacts(config, MODEL, "llama", known.base, sketch=known.sketch)
        (root / name).mkdir()
        adapters.write_ours(adapters.OpenedAdapter(facts, factors, root / name), root / name, lambda n: None)
    return root


@pytest.fixture
def said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the entry point writes."""
    return lambda *words: call(sample.main, [str(word) for word in words], capsys, monkeypatch)


def test_one_adapter_answers_as_its_merged_export_and_several_by_name(home: Path, said: Callable) -> None:
    """DIR is the merged model in both frameworks; of NAME=DIR each answers on the one base as it does alone."""
    alone = {}
    for name in ("base", "one", "two"):  # an adapter that knows its base is a target too
        done = said(home / name, *WORDS, "--framework", "torch")
        assert done.code == 0, done.err
        alone[name] = done.out
    assert len(set(alone.values())) == 3
    for framework in ("jax", "torch"):
        words = (home / "base", *WORDS, "--framework", framework, "--adapter")
        assert said(*words, home / "one").out == alone["one"]
        several = said(*words, f"x={home / 'one'}", "--adapter", f"y={home / 'two'}")
        assert several.out == f"--- x\n{alone['one']}--- y\n{alone['two']}", several.err
    lines = said(*words, f"x={home / 'one'}", "--adapter", f"y={home / 'two'}", "--json").out.splitlines()
    assert [json.loads(line)["adapter"] for line in lines] == ["x", "y"]


def test_a_dialogue_changes_its_adapter(home: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """:adapter NAME, without a name the base; an unknown name changes nothing."""
    names = (f"x={home / 'one'}", f"y={home / 'two'}")
    options = SampleOptions(
        str(home / "base"), framework="torch", adapter=names, greedy=True, max_new_tokens=8
    )
    dialogue = Dialogue(Sampler(open_target(home / "base"), options))

    def answer(line: str) -> bytes:
        capfdbinary.readouterr()
        dialogue.handle(line)
        return capfdbinary.readouterr().out

    first = answer("ab")
    dialogue.handle(":adapter y")
    second = answer("ab")
    with pytest.raises(ValueError, match="no adapter 'z'; there is x, y"):
        dialogue.handle(":adapter z")
    assert answer("ab") == second != first
    dialogue.handle(":adapter")
    third = answer("ab")
    dialogue.handle(":adapter x")
    assert answer("ab") == first != third != second


def test_what_cannot_be_is_one_line(home: Path, tmp_path: Path, said: Callable) -> None:
    """Several without names, a name twice, an adapter of another model, none at all."""
    other = tmp_path / "other"
    export_torch(MODEL, random_params(MODEL, 1, dtype=np.float32), other)
    (other / "tokenizer.json").write_bytes((home / "base" / "tokenizer.json").read_bytes())
    one, two = home / "one", home / "two"
    for words, says in {
        (home / "base", "--adapter", one, "--adapter", two): "several adapters have names",
        (home / "base", "--adapter", f"x={one}", "--adapter", f"x={two}"): "'x' stands twice",
        (home / "base", "--adapter", f"={one}"): "is empty",
        (home / "base", "--adapter", home / "base"): "no adapter",
        (home / "base", "--adapter", tmp_path / "none"): "does not exist; an adapter was expected there",
        (other, "--adapter", one): "another model",
        (other, "--adapter", f"x={one}"): "sampled values differ",
    }.items():
        done = said(*words, *WORDS)
        assert done.code == 2 and says in done.err and len(done.err.strip().splitlines()) == 1, (
            words,
            done.err,
        )
