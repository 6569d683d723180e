"""Exports in other people's environments: torch and some transformers, nothing of ours installed.

    JAXLM_HF_PYTHONS=/path/to/transformers4/bin/python:/path/to/transformers5/bin/python pytest -m slow -s THIS_FILE

Without the variable, the interpreter that runs the tests stands in, if it has transformers.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import random_params, tiny  # noqa: E402
from tolerances import GATES  # noqa: E402

from convert import __main__ as entry_point  # noqa: E402
from convert.native import build_torch  # noqa: E402
from jaxlm.config import ModelConfig, RopeScaling, save  # noqa: E402
from jaxlm.tensor_file import Lazy, Planned, write_file  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("open_with_transformers.py")
NEW_TOKENS = 16
SIZES = {"vocab_size": 420, "context": 128, "init": "fan_in"}  # 20 more ids than the tokenizer has
LLAMA3 = RopeScaling("llama3", 8.0, original_context=32, low_freq_factor=1.5, high_freq_factor=6.0)
# tiny() has D != N H, theta 5e4 and eps 3e-6, which are no class's defaults; family -> what it is asked to compute.
MODELS: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("llama", tiny(rope_scaling=LLAMA3, **SIZES)),
    "llama-biases-tied": (
        "llama",
        tiny(qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied=True, **SIZES),
    ),
    "mistral-window": ("mistral", tiny(windows=(7,), **SIZES)),
    "mixtral": ("mixtral", tiny({"d_ff": 0}, d_ff=20, **SIZES)),
    "mixtral-window-tied": ("mixtral", tiny({"d_ff": 0}, d_ff=20, windows=(9,), tied=True, **SIZES)),
    "qwen2-tied": ("qwen2", tiny(qkv_bias=True, tied=True, **SIZES)),
    "qwen2-layers-window": ("qwen2", tiny(qkv_bias=True, windows=(0, 7), **SIZES)),
    # transformers 4 has this class with D = N H only.
    "qwen2_moe": (
        "qwen2_moe",
        tiny(
            {"shared_d_ff": 8, "shared_gate": True, "renormalize": False}, head_dim=4, qkv_bias=True, **SIZES
        ),
    ),
    "qwen3": ("qwen3", tiny(qk_norm=True, windows=(7, 0), **SIZES)),
    "qwen3-tied-llama3": ("qwen3", tiny(qk_norm=True, tied=True, rope_scaling=LLAMA3, **SIZES)),
    "qwen3_moe": ("qwen3_moe", tiny({"pattern": (False, True)}, qk_norm=True, n_layers=2, **SIZES)),
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß dich 😀"}]
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüß dich 😀<|im_end|>\n<|im_start|>assistant\n"


def environments() -> list[str]:
    """Interpreters to ask."""
    named = [path for path in os.environ.get("JAXLM_HF_PYTHONS", "").split(os.pathsep) if path]
    return named or ([sys.executable] if importlib.util.find_spec("transformers") else [])


def texts() -> list[str]:
    """240 strings: scripts, emoji, combining marks, runs of white space, texts of special tokens, random Unicode."""
    rng = random.Random(0)
    anything = [chr(c) for c in range(1, sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    cjk = [chr(c) for c in (*range(0x3040, 0x30FF), *range(0x4E00, 0x9FFF), *range(0xAC00, 0xD7A3))]
    spaces = " \t\n\r\v\f\u00a0\u1680\u2003\u2028\u3000\u200b"
    marks = [chr(c) for c in range(0x300, 0x36F)]
    specials = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|bos|>",
        "<|pad|>",
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
    ]
    hard = [
        "",
        " ",
        "\n",
        "\0",
        "a\n\n\nb\r\n\tc ",
        "12345678 ٣٤٥ ½",
        "e\u0301 é ﬁ \u2126 \u0958 \u0387",
        "x" + " " * 50,
    ]
    hard += [
        " !?... , n't",
        "don't WE'LL i'm I\u017f",
        "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
        "שָׁלוֹם مرحبا नमस्ते ไทย",
        "\ufeffbom \ufffd \ufdfa",
    ]
    made = ["".join(rng.choices(anything, k=80)) for _ in range(90)]
    made += ["".join(rng.choices(cjk, k=30)) for _ in range(30)]
    made += ["".join(rng.choices(spaces, k=rng.randint(1, 40))) + "ab" for _ in range(30)]
    made += [
        "".join(c + "".join(rng.choices(marks, k=2)) for c in rng.choices("aeiouñ", k=8)) for _ in range(30)
    ]
    made += ["".join(rng.choices([*specials, " ", "ab", "\n"], k=6)) for _ in range(30)]
    made += ["".join(chr(rng.randint(0x1F300, 0x1FAFF)) for _ in range(10)) for _ in range(17)]
    return hard + specials + made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained byte-level BPE that merges digits, accents and white space."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    lines = [f"{n} naïve cafe\u0301 {n * 7}\n\n  东京 don't WE'LL {'ab' * (n % 5)}\r\n" for n in range(2000)]
    Tokenizer.train(lines, 400).save(path)
    return path


def exported(name: str, tokenizer: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """What the command line writes, and what torchref computes in float64: logits and a greedy continuation."""
    family, config = MODELS[name]
    params = random_params(config, dtype=np.float32)
    source, out = folder / "source", folder / "out"
    source.mkdir()
    plans = {path: Planned.of(Lazy.of(x)) for path, x in params.items()}
    write_file(source / "model.safetensors", plans, {"format": "jaxlm"})
    save(config, source / "config.json")
    (source / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    assert entry_point.main(["export", str(source), str(out), "--to", "hf", "--family", family]) == 0
    model = build_torch(config, params).double()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 100))
    with torch.no_grad():
        np.save(folder / "logits.npy", model(torch.from_numpy(ids))[0].numpy())
        rows = torch.from_numpy(ids)
        for _ in range(NEW_TOKENS):
            rows = torch.cat([rows, model(rows)[0][:, -1:].argmax(-1)], dim=1)
    questions = {
        "ids": ids.tolist(),
        "logits": str(folder / "logits.npy"),
        "new_tokens": NEW_TOKENS,
        "texts": texts(),
        "chat": CHAT,
    }
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    return out, {"generated": rows[:, 100:].tolist()}


def asked(python: str, directory: Path, questions: Path) -> subprocess.CompletedProcess[str]:
    """The script's answer in that environment, from where nothing of ours can be imported."""
    kept = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    command = [python, "-I", str(SCRIPT), str(directory), str(questions)]
    environment = {"PATH": os.environ.get("PATH", ""), **kept}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=directory, timeout=300
    )


@pytest.mark.parametrize("name", MODELS)
def test_transformers_alone_computes_the_same(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """No key missing, unexpected or misshapen; float32 logits, greedy ids, token ids and chat as here."""
    pythons = environments()
    if not pythons:
        pytest.skip("no environment with transformers: set JAXLM_HF_PYTHONS")
    out, expected = exported(name, tokenizer, tmp_path)
    ours = Tokenizer.load(tokenizer)
    ids = [ours.encode(text, special=True) for text in texts()]
    assert len(ids) >= 200
    for python in pythons:
        done = asked(python, out, tmp_path / "questions.json")
        assert done.returncode == 0, f"{python}: {done.stderr[-2000:]}"
        answer = json.loads(done.stdout)
        where = f"transformers {answer['transformers']}, {answer['class']}"
        print(f"\n{name}: {where}: float32 logits off by {answer['relative_error']:.1e}")
        assert answer["relative_error"] <= GATES["f32_transformers"].value, where
        assert answer["generated"] == expected["generated"], where
        wrong = [text for text, a, b in zip(texts(), answer["token_ids"], ids, strict=True) if a != b]
        assert not wrong, f"{where}: other ids for {wrong[:3]!r}"
        assert [t for t, d in zip(texts(), answer["decoded"], strict=True) if t != d] == [], where
        assert answer["special_ids"] == [ours.bos_id, ours.eos_id, ours.pad_id], where
        assert answer["chat"] == RENDERED, where
        assert answer["dtype"] == "float32", where


def test_the_question_can_be_answered_wrongly(tokenizer: Path, tmp_path: Path) -> None:
    """The script itself goes red: a missing tensor, a default theta, a tokenizer that splits otherwise."""
    pythons = environments()
    if not pythons:
        pytest.skip("no environment with transformers: set JAXLM_HF_PYTHONS")
    out, _ = exported("llama", tokenizer, tmp_path)
    from damage import edit_json, edit_tensors

    config, theirs = (out / "config.json").read_text(), json.loads((out / "tokenizer.json").read_text())
    theirs["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    ours = Tokenizer.load(tokenizer)
    for python in pythons:
        edit_json(
            out / "config.json", rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
        edit_json(out / "config.json", rope_scaling=None)
        kept = (out / "tokenizer.json").read_text()
        (out / "tokenizer.json").write_text(json.dumps(theirs))
        done = asked(python, out, tmp_path / "questions.json")
        assert done.returncode == 0, done.stderr[-2000:]
        answer = json.loads(done.stdout)
        assert answer["relative_error"] > 1e3 * GATES["f32_transformers"].value
        assert answer["token_ids"] != [ours.encode(text, special=True) for text in texts()]
        (out / "config.json").write_text(config)
        (out / "tokenizer.json").write_text(kept)
    edit_tensors(out / "model.safetensors", lambda found: found.pop("model.norm.weight"))
    for python in pythons:
        done = asked(python, out, tmp_path / "questions.json")
        assert done.returncode == 1 and "model.norm.weight" in done.stderr
