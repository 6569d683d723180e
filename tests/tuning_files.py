"""A tiny base model in Hugging Face's format, conversations and preferences: what tests of fine-tuning start from."""

import json
import random
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from helpers import random_params, tiny

from convert.__main__ import main as convert
from jaxlm.config import save
from jaxlm.tensor_file import Lazy, Planned, write_file
from jaxlm.tokenizer import Tokenizer

WORDS = ("cat", "dog", "owl", "fox", "hen", "bee", "ant", "elk")
CONTEXT = 40


def turn(word: str, answer: str | None = None) -> list[dict[str, str]]:
    """A question about a word and its answer."""
    answer = f"{word} {word}" if answer is None else answer
    return [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A jsonl file, a row a line; what is text already stands there as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_chats(path: Path, n: int = 48) -> Path:
    """Conversations of one or two turns, no two of them the same."""
    rng = random.Random(0)
    rows = []
    for i in range(n):
        words = rng.sample(WORDS, 1 + i % 2)
        rows.append({"messages": [{"role": "system", "content": f"n {i}"}, *chain(*map(turn, words))]})
    return write_rows(path, rows)


def write_preferences(path: Path, n: int = 24) -> Path:
    """Questions with a short answer that is preferred to a long one."""
    words = [WORDS[i % len(WORDS)] + " " * (i // len(WORDS)) + WORDS[i * 3 % len(WORDS)] for i in range(n)]
    rows = [
        {"prompt": turn(word)[:1], "chosen": turn(word, "ok")[1:], "rejected": turn(word, f"not {word}")[1:]}
        for word in words
    ]
    return write_rows(path, rows)


def write_base(path: Path, moe: dict[str, Any] | None = None) -> Path:
    """A model directory of ours with a tokenizer that knows ChatML."""
    path.mkdir()
    sizes = {"n_layers": 1, "vocab_size": 300, "context": CONTEXT, "init": "fan_in"}
    config = tiny(moe, **sizes)
    params = random_params(config, 0, dtype=np.float32)
    planned = {name: Planned.of(Lazy.of(x)) for name, x in params.items()}
    write_file(path / "model.safetensors", planned, {"format": "jaxlm"})
    save(config, path / "config.json")
    texts = [f"system n user say assistant not ok {' '.join(WORDS)}"] * 3
    Tokenizer.train(texts, 296).save(path / "tokenizer.json")
    return path


def exported(base: Path, out: Path, to: str = "hf") -> Path:
    """A target as another format."""
    assert not convert(["export", str(base), "--to", to, str(out)])
    return out
