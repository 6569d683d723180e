"""llama.cpp itself on files written here: the same logits as our float64 forward, the same token ids.

Needs llama-cpp-python, in this interpreter or in the one that JAXLM_LLAMA_PYTHON names.
"""

import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import float64, random_params, relative_error, tiny
from tolerances import tolerance

from convert import gguf_file
from convert.stream import array
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.model import abstract_model, merge_model
from jaxlm.tensor_file import Lazy
from jaxlm.tokenizer import GPT2_PATTERN, PATTERN, SPECIAL_TOKENS, Tokenizer

pytest.importorskip("gguf")
PYTHON = os.environ.get("JAXLM_LLAMA_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") else ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="needs llama.cpp: pip install llama-cpp-python, or name a Python that has it in JAXLM_LLAMA_PYTHON",
    ),
]
GATE = tolerance("f32_llama_cpp")
ROUNDED = {kind: tolerance(f"{kind}_llama_cpp") for kind in ("f16", "bf16", "q8_0")}
LENGTH = 31
BLOCKS = {"d_model": 64, "n_heads": 8, "n_kv_heads": 2, "head_dim": 16, "d_ff": 96}

SCALINGS = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", 2.5),
    "llama3": RopeScaling("llama3", 8.0, 16, low_freq_factor=1.5, high_freq_factor=6.0),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "yarn-attention": RopeScaling("yarn", 4.0, 16, attention_factor=0.7),
    "yarn-ramp": RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25),
    "yarn-ramp-attention": RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25, attention_factor=1.3),
    "yarn-shrinking": RopeScaling("yarn", 0.5, 16),
    "yarn-degenerate": RopeScaling("yarn", 4.0, 1),
}
MODELS = {
    f"{init}-{'dense' if moe is None else 'moe'}-{heads}/{kv}": tiny(
        moe, n_heads=heads, n_kv_heads=kv, init=init
    )
    for init in ("normal", "fan_in")
    for moe in (None, {})
    for heads, kv in ((8, 2), (6, 3), (6, 2), (4, 4), (4, 1))
}
MODELS |= {name: tiny(head_dim=16, init="fan_in", rope_scaling=s) for name, s in SCALINGS.items()}
MODELS |= {
    "biased-tied": tiny(qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied=True, init="fan_in"),
    "biased-moe": tiny({"n_experts": 5, "n_active": 3}, qkv_bias=True, attn_out_bias=True, init="fan_in"),
    "one-expert": tiny({"n_active": 1}, init="fan_in"),
    "other-eps": tiny(norm_eps=1e-2),
    "other-theta": tiny(rope_theta=12.5, init="fan_in"),
}


def llama(jobs: list[dict[str, Any]], folder: Path) -> dict[str, np.ndarray]:
    """The worker's answers."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    worker = Path(__file__).with_name("llama_worker.py")
    command = [PYTHON, str(worker), str(folder / "jobs.json"), str(folder / "out.npz")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "out.npz", allow_pickle=False) as out:
        return dict(out)


def forward(config: ModelConfig, params: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [T, V] of our model, all in float64."""
    with float64():
        graph = abstract_model(config, dtype="float64").graphdef
        model = merge_model(graph, {path: jax.numpy.asarray(p, "float64") for path, p in params.items()})
        return np.asarray(model(jax.numpy.asarray([ids]))[0][0])


def errors_of(models: dict[str, ModelConfig], kind: Any, folder: Path) -> dict[str, float]:
    """Relative error of llama.cpp's logits, by model: against the weights that are in the file."""
    rng, jobs, wanted = np.random.default_rng(0), [], []
    for number, config in enumerate(models.values()):
        params = random_params(config, dtype=np.float32)
        path = folder / f"{number}.gguf"
        gguf_file.write(
            path, config, {p: Lazy.of(x) for p, x in params.items()}, kind=kind, tokenizer=None, name="test"
        )
        ids = rng.integers(0, config.vocab_size, LENGTH).tolist()
        source = gguf_file.read(path)
        jobs.append({"model": str(path), "ids": [ids]})
        wanted.append(forward(source.config, {p: array(x) for p, x in source.tensors.items()}, ids))
        assert source.config == config
    out = llama(jobs, folder)
    return {name: relative_error(out[f"logits.{i}.0"], wanted[i]) for i, name in enumerate(models)}


def test_llama_cpp_computes_our_logits(tmp_path):
    """float32 files of dense and MoE models, all ratios of heads, initialisations and RoPE scalings, biases, ties."""
    errors = errors_of(MODELS, "f32", tmp_path)
    print(*(f"{name} {error:.2e}" for name, error in errors.items()), sep="\n")
    assert max(errors.values()) <= GATE, {name: e for name, e in errors.items() if not e <= GATE}


@pytest.mark.parametrize("kind", ROUNDED)
def test_llama_cpp_reads_rounded_files(tmp_path, kind):
    """Halves and 8 bits: against our float64 forward on the weights of the file, so only activations are rounded."""
    models = {
        f"{init}-{name}": tiny(moe, init=init, **BLOCKS)
        for init in ("normal", "fan_in")
        for name, moe in (("dense", None), ("moe", {"d_ff": 32}))
    }
    errors = errors_of(models, kind, tmp_path)
    print(*(f"{kind} {name} {error:.2e}" for name, error in errors.items()), sep="\n")
    assert max(errors.values()) <= ROUNDED[kind], errors


def fault_unpermuted_k(config, params):
    """k as it lies here, as if its interleaving had been forgotten."""
    inverse = gguf_file.interleaved(config.n_kv_heads).inverse
    return {p: inverse(np.ascontiguousarray(x.T)) if "k_proj" in p else x for p, x in params.items()}


def fault_k_with_all_heads(config, params):
    """k interleaved as if it had the query heads' number."""
    wrong, right = gguf_file.interleaved(config.n_heads), gguf_file.interleaved(config.n_kv_heads)
    return {p: right.inverse(wrong.forward(x)) if "k_proj" in p else x for p, x in params.items()}


FAULTS = {
    "unpermuted k": (fault_unpermuted_k, {}),
    "k permuted with n_heads": (fault_k_with_all_heads, {}),
    "another eps": (lambda config, params: params, {"norm_eps": 3.3e-6}),
    "theta lost": (lambda config, params: params, {"rope_theta": 1e4}),
    "scaling lost": (lambda config, params: params, {"rope_scaling": RopeScaling()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(tmp_path, fault):
    """What the file gets wrong shows in the logits, far over the gate."""
    damage, changes = FAULTS[fault]
    config = tiny(n_heads=8, n_kv_heads=2, head_dim=16, rope_scaling=SCALINGS["llama3"])
    params, ids = random_params(config, dtype=np.float32), list(range(LENGTH))
    wrong = {p: Lazy.of(x) for p, x in damage(config, params).items()}
    told = dataclasses.replace(config, **changes)
    gguf_file.write(tmp_path / "m.gguf", told, wrong, kind="f32", tokenizer=None, name="test")
    out = llama([{"model": str(tmp_path / "m.gguf"), "ids": [ids]}], tmp_path)
    error = relative_error(out["logits.0.0"], forward(config, params, ids))
    print(f"{fault}: {error:.2e}")
    assert error > 10 * GATE


ATOMS = [" ", "  ", "\n", "\r\n", "\t", "\x85", "\u00a0", "\u2028", "\u3000", "\x1c"]
ATOMS += [
    "'s",
    "'LL",
    "'Ve",
    "'ſ",
    "12345",
    "٣",
    "½",
    "Ⅷ",
    "你好",
    "😀",
    "👩\u200d💻",
    "é",
    "e\u0301",
    "नमस्ते",
]
ATOMS += ["aaaaaaa", "ababab", "def ", "return", "...", "__", "!?\n\n", "A", "ß", "Привет", "العربية", "ab1"]
ATOMS += [*SPECIAL_TOKENS, "<|bos", "|>", "<|unused_0|>", "<think", "[PAD500]"]


def random_text(rng: random.Random, length: int) -> str:
    """Words, white space, marks, lookalikes of special tokens, and any character below Unicode 16's additions."""
    planes = [(0x20, 0x250), (0x250, 0x1C80), (0x1C90, 0xA7C0), (0xA800, 0xD800), (0x1F300, 0x20000)]

    def piece() -> str:
        chance = rng.random()
        if chance < 0.5:
            return rng.choice(ATOMS)
        return chr(rng.randrange(*rng.choice(planes))) if chance < 0.7 else rng.choice("abc xyz 0 1\n'.")

    return "".join(piece() for _ in range(length))


@pytest.mark.parametrize("name", ["trained", "gpt2", "unmerged"])
def test_llama_cpp_gives_our_token_ids(tmp_path, name):
    """1,000 texts; the file is also loaded whole and computes, so that tokenizer and weights fit together."""
    rng = random.Random(0)
    tokenizer = Tokenizer.train(
        [random_text(rng, 200) for _ in range(200)] + ["x \n  y\n\n\n  z\t\t 's" * 20], 900
    )
    if name == "gpt2":
        tokenizer = Tokenizer(GPT2_PATTERN, tokenizer.codec.ranks, tokenizer.specials)
    elif name == "unmerged":
        words = {
            w: 256 + i for i, w in enumerate([b"ab", b"xyz", b" return", b"\n\n\n", "你好".encode(), b"123"])
        }
        tokenizer = Tokenizer(PATTERN, {bytes([b]): b for b in range(256)} | words, {"<|eos|>": 300})
    config = tiny(n_layers=1, vocab_size=tokenizer.vocab_size + 3)
    params = random_params(config, dtype=np.float32)
    lazy = {path: Lazy.of(value) for path, value in params.items()}
    path = tmp_path / "m.gguf"
    gguf_file.write(path, config, lazy, kind="f32", tokenizer=tokenizer, name="test")
    texts = [random_text(rng, rng.randint(1, 40)) for _ in range(1000)]
    ids = tokenizer.encode(texts[0])[:LENGTH]
    out = llama([{"model": str(path), "texts": texts}, {"model": str(path), "ids": [ids]}], tmp_path)
    ends = np.cumsum(out["lengths.0"])
    theirs = [row.tolist() for row in np.split(out["ids.0"], ends[:-1])]
    different = [text for text, row in zip(texts, theirs, strict=True) if row != tokenizer.encode(text)]
    assert different == [], f"{len(different)} of {len(texts)}, {different[0]!r}"
    assert relative_error(out["logits.1.0"], forward(config, params, ids)) <= GATE
