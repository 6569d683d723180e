"""Malformed and hostile inputs at the command line: one clear line for each fault, exit code 2, nothing left behind."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from damage import edit_header, edit_json, edit_tensors, flip, split  # noqa: E402
from entry import run  # noqa: E402
from helpers import random_params, tiny  # noqa: E402

from convert import __main__ as entry_point  # noqa: E402
from convert import hf  # noqa: E402
from jaxlm import model_dir  # noqa: E402
from jaxlm.config import save  # noqa: E402
from jaxlm.tensor_file import Lazy, Planned  # noqa: E402

pytestmark = pytest.mark.torch

DENSE, MOE = tiny(init="fan_in"), tiny({"d_ff": 16})
EMBED, Q = "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"
W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Healthy directories: hf (Llama), moe (Mixtral), ours (jaxlm's own)."""
    root = tmp_path_factory.mktemp("healthy")
    for name, config in {"hf": DENSE, "moe": MOE}.items():
        (root / name).mkdir()
        params = {path: Lazy.of(x) for path, x in random_params(config, dtype=np.float32).items()}
        hf.write(root / name, config, params)
    with model_dir.staged(root / "ours") as out:
        plans = {path: Planned.of(Lazy.of(x)) for path, x in random_params(DENSE, dtype=np.float32).items()}
        stored = model_dir.write_shards(out, plans, "jaxlm")
        save(DENSE, out / "config.json")
        model_dir.write_manifest(out, "jaxlm", stored)
    return root


class Bomb:
    """Unpickled with code execution, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Case(NamedTuple):
    """A damage done to a healthy directory, and what the message must name."""

    source: str
    damage: Callable[[Path], object]
    says: tuple[str, ...]


def config(**changes: object) -> Callable[[Path], None]:
    """Damages config.json."""
    return lambda d: edit_json(d / "config.json", **changes)


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Replaces a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda d: (d / name).write_bytes(raw)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damages the weights but keeps their file well-formed."""
    return lambda d: edit_tensors(d / "model.safetensors", change)


def header(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Damages the header of the weights."""
    return lambda d: edit_header(d / "model.safetensors", change)


def set_value(name: str, value: float) -> Callable[[dict], None]:
    """Puts a value into a tensor."""

    def change(found: dict) -> None:
        found[name].reshape(-1)[3] = value

    return change


def half(path: Path) -> None:
    """Cuts a file in two and keeps the first part."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def in_both_shards(directory: Path) -> None:
    """One tensor stands in two shards."""
    first, second = split(directory)
    edit_tensors(second, lambda found: found.update({EMBED: np.zeros((61, 24), np.float32)}))
    edit_tensors(first, lambda found: found.update({EMBED: np.zeros((61, 24), np.float32)}))


def weight_map(**changes: object) -> Callable[[Path], None]:
    """Two shards, and an index that is wrong about them."""

    def change(directory: Path) -> None:
        split(directory)
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] |= changes
        path.write_text(json.dumps(index))

    return change


def bfloat16_infinity(found: dict) -> None:
    """The weights in bfloat16, one of them infinite."""
    for name in found:
        found[name] = found[name].astype(ml_dtypes.bfloat16)
    found[Q][0, 0] = np.inf


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CASES: dict[str, Case] = {
    "no config": Case("hf", lambda d: (d / "config.json").unlink(), ("config.json",)),
    "config is not JSON": Case("hf", text("config.json", "{"), ("config.json",)),
    "config is a list": Case("hf", text("config.json", "[1]"), ("config.json", "object")),
    "config is not UTF-8": Case("hf", text("config.json", b"\xff\xfe{}"), ("config.json",)),
    "config is nested without end": Case("hf", text("config.json", "[" * 100_000), ("config.json",)),
    "unknown family": Case("hf", config(model_type="gpt_neox"), ("model_type", "gpt_neox")),
    "another activation": Case("hf", config(hidden_act="gelu"), ("hidden_act", "gelu")),
    "unknown key": Case("hf", config(logit_softcap=30.0), ("logit_softcap", "30")),
    "quantised weights": Case("hf", config(quantization_config={"bits": 4}), ("quantization_config",)),
    "rope that is not known": Case(
        "hf", config(rope_parameters=None, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ("dynamic",)
    ),
    "a width below zero": Case("hf", config(hidden_size=-24), ("-24",)),
    "a width that is text": Case("hf", config(hidden_size="24"), ("hidden_size", "24")),
    "a width that is huge": Case("hf", config(hidden_size=10**15), ("d_model=1000000000000000",)),
    "more layers than a file can hold": Case("hf", config(num_hidden_layers=10**9), ("num_hidden_layers",)),
    "more experts than a file can hold": Case("moe", config(num_local_experts=10**9), ("num_local_experts",)),
    "heads that do not divide": Case("hf", config(num_key_value_heads=4), ("n_heads=6", "n_kv_heads=4")),
    "eps that is no number": Case(
        "hf",
        lambda d: text("config.json", (d / "config.json").read_text().replace("3e-06", "NaN"))(d),
        ("NaN",),
    ),
    "a padded vocabulary": Case("hf", config(vocab_size=57), (EMBED, "61", "57")),
    "only a pickle": Case(
        "hf", lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), ("pytorch_model.bin", "safetensors")
    ),
    "no weights": Case("hf", lambda d: (d / WEIGHTS).unlink(), (WEIGHTS,)),
    "a missing tensor": Case("hf", tensors(lambda t: t.pop(Q)), (Q, "missing")),
    "a missing expert": Case("moe", tensors(lambda t: t.pop(W1)), (W1, "missing")),
    "an extra tensor": Case(
        "hf", tensors(lambda t: t.update(extra=np.zeros(2, np.float32))), ("extra", "unused")
    ),
    "a transposed tensor": Case(
        "hf", tensors(lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)})), (Q, "(24, 36)", "(36, 24)")
    ),
    "weights that are integers": Case(
        "hf", tensors(lambda t: t.update({Q: np.zeros((36, 24), np.int32)})), (Q, "int32")
    ),
    "NaN": Case(
        "hf", tensors(set_value(Q, np.nan)), ("blocks.1.attn.q_proj.weight", "1 of 864", "not finite")
    ),
    "infinity in bfloat16": Case(
        "hf", tensors(bfloat16_infinity), ("blocks.1.attn.q_proj.weight", "not finite")
    ),
    "a head that is not tied": Case("hf", config(tie_word_embeddings=True), ("lm_head.weight",)),
    "truncated weights": Case("hf", lambda d: half(d / WEIGHTS), (WEIGHTS, "truncated")),
    "empty weights": Case("hf", text(WEIGHTS, b""), (WEIGHTS, "header")),
    "a header of 2^62 bytes": Case(
        "hf", text(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), (WEIGHTS, "header")
    ),
    "a header that is not JSON": Case("hf", header(lambda h: h[:-30] + "x" * 30), (WEIGHTS, "JSON")),
    "a key twice": Case(
        "hf",
        header(
            lambda h: h.rstrip()[:-1] + "," + h[h.index(f'"{Q}"') : h.index("}", h.index(f'"{Q}"')) + 1] + "}"
        ),
        (Q, "twice"),
    ),
    "an unknown dtype": Case("hf", header(lambda h: h.replace('"F32"', '"F31"', 1)), ("F31", "unknown")),
    "shapes that overflow": Case(
        "hf", header(lambda h: h.replace("[61,24]", f"[{1 << 40},{1 << 40}]", 1)), ("needs", "bytes")
    ),
    "tensors that overlap": Case(
        "hf", header(lambda h: h.replace('"data_offsets":[0,', '"data_offsets":[4,', 1)), ()
    ),
    "bytes after the last tensor": Case(
        "hf",
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"\0" * 8),
        ("8 bytes", "nothing"),
    ),
    "a missing shard": Case("hf", lambda d: split(d)[1].unlink(), ("model-00002-of-00002.safetensors",)),
    "an index that is not JSON": Case("hf", lambda d: (split(d), text(INDEX, "{")(d)), (INDEX,)),
    "an index without a map": Case("hf", lambda d: (split(d), text(INDEX, "{}")(d)), (INDEX,)),
    "an index that leaves the directory": Case(
        "hf", weight_map(**{Q: "../../etc/passwd"}), ("../../etc/passwd",)
    ),
    "an index of an absolute path": Case("hf", weight_map(**{Q: "/etc/passwd"}), ("/etc/passwd",)),
    "an index that names what is not there": Case(
        "hf", weight_map(ghost="model-00001-of-00002.safetensors"), ("ghost",)
    ),
    "a tensor in two shards": Case("hf", in_both_shards, (EMBED,)),
    "a manifest that was edited": Case(
        "ours",
        lambda d: text("manifest.json", (d / "manifest.json").read_text().replace("jaxlm", "jaxln"))(d),
        ("manifest.json", "SHA-256"),
    ),
    "our config with an unknown key": Case("ours", config(n_layer=2), ("n_layer", "n_layers")),
    "our config for another model": Case("ours", config(n_layers=3), ("blocks.2", "missing")),
    "our config with layers without end": Case("ours", config(n_layers=10**9), ("n_layers=1000000000",)),
    "not a GGUF file": Case("ours", text("model.gguf", b"GGML" + b"\0" * 64), ("model.gguf",)),
    "a GGUF file of nothing": Case("ours", text("model.gguf", b"GGUF"), ("model.gguf",)),
    "a GGUF file that claims 2^60 tensors": Case(
        "ours", text("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0)), ("model.gguf",)
    ),
    "a pickle that would run code": Case(
        "ours", lambda d: torch.save({"model": Bomb(d / "ran")}, d / "model.pt"), ("model.pt",)
    ),
    "a bare pickle that would run code": Case(
        "ours", lambda d: (d / "model.pt").write_bytes(pickle.dumps(Bomb(d / "ran"))), ("model.pt",)
    ),
    "a .pt of text": Case("ours", text("model.pt", "hello"), ("model.pt",)),
}


def outcome(argv: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line in this process."""
    return run(entry_point.main, argv, capsys, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_source_is_one_clear_line_and_exit_code_2(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the file, the tensor or the value; nothing is written, nothing is executed."""
    case, source = CASES[name], tmp_path / "source"
    shutil.copytree(sources / case.source, source)
    case.damage(source)
    single = [source / file for file in ("model.gguf", "model.pt") if (source / file).exists()]
    said = outcome(["import", str((single or [source])[0]), str(tmp_path / "new")], capsys, monkeypatch)
    assert said.code == 2, said.err
    assert said.err.startswith("error: ") and "Traceback" not in said.err
    missing = [words for words in case.says if words not in said.err]
    assert not missing, f"{missing} not in: {said.err}"
    assert max(map(len, said.err.splitlines())) < 400, "a line is a line"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"], "something was left behind"
    assert not (source / "ran").exists(), "code of the file was executed"


def test_the_table_is_long_enough_and_its_sources_are_healthy(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undamaged, each source is imported: what the table sees is the damage."""
    assert len(CASES) >= 40
    for name in ("hf", "moe", "ours"):
        said = outcome(["import", str(sources / name), str(tmp_path / name)], capsys, monkeypatch)
        assert said.code == 0, said.err


def test_every_fault_is_found_at_once(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bad tensors are three lines, two bad keys of the config are two; NaN is counted in every tensor."""
    source = tmp_path / "source"
    shutil.copytree(sources / "hf", source)

    def change(found: dict) -> None:
        found.pop(Q)
        found["extra"] = np.zeros(3, np.float32)
        found[EMBED] = found[EMBED][:, :-1].copy()

    edit_tensors(source / WEIGHTS, change)
    said = outcome(["import", str(source), str(tmp_path / "new")], capsys, monkeypatch)
    assert said.code == 2 and all(name in said.err for name in (Q, "extra", EMBED)), said.err
    edit_json(source / "config.json", hidden_act="relu", logit_softcap=3)
    said = outcome(["import", str(source), str(tmp_path / "new")], capsys, monkeypatch)
    assert said.code == 2 and all(name in said.err for name in ("hidden_act", "logit_softcap")), said.err
    shutil.rmtree(source)
    shutil.copytree(sources / "hf", source)
    edit_tensors(source / WEIGHTS, lambda t: (set_value(Q, np.nan)(t), set_value(EMBED, -np.inf)(t)))
    said = outcome(["import", str(source), str(tmp_path / "new")], capsys, monkeypatch)
    assert said.code == 2 and said.err.count("not finite in float32") == 2, said.err


BAD_WORDS = {
    "no command": ([], 2, ""),
    "unknown command": (["exprot"], 2, "export"),
    "no paths": (["import"], 2, "SRC DST"),
    "one path": (["export", "{ours}"], 2, "DST"),
    "no format": (["export", "{ours}", "{new}"], 2, "--to"),
    "unknown format": (["export", "{ours}", "{new}", "--to", "tflite"], 2, "tflite"),
    "unknown option": (["export", "{ours}", "{new}", "--to", "hf", "--dtpye", "x"], 2, "--dtype"),
    "no such target": (["export", "{ours}x", "{new}", "--to", "hf"], 2, "does not exist"),
    "a shard of no size": (
        ["export", "{ours}", "{new}", "--to", "hf", "--max-shard-gb", "0"],
        2,
        "--max-shard-gb",
    ),
    "a destination that is there": (["export", "{ours}", "{hf}", "--to", "hf"], 2, "--overwrite"),
    "a destination below a file": (
        ["export", "{ours}", "{ours}/config.json/x", "--to", "hf"],
        2,
        "config.json",
    ),
    "a family that does not fit": (
        ["export", "{moe}", "{new}", "--to", "hf", "--family", "llama"],
        2,
        "n_experts",
    ),
    "an unknown family": (["export", "{ours}", "{new}", "--to", "hf", "--family", "lama"], 2, "lama"),
    "q8_0 outside GGUF": (["export", "{ours}", "{new}", "--to", "hf", "--dtype", "q8_0"], 2, "gguf"),
    "float64 in GGUF": (["export", "{ours}", "{new}", "--to", "gguf", "--dtype", "float64"], 2, "float64"),
    "GGUF without a tokenizer": (["export", "{ours}", "{new}", "--to", "gguf"], 2, "--no-tokenizer"),
    "gptoss of another form": (["export", "{ours}", "{new}", "--to", "gptoss"], 2, "swiglu"),
    "verify without a manifest": (["verify", "{hf}"], 2, "manifest.json"),
    "verify of nothing": (["verify", "{ours}x"], 2, "not a directory"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_words_are_one_line_and_exit_code_2(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed wrong is named, with what is right where there is something near."""
    argv, code, words = BAD_WORDS[name]
    places = {key: sources / key for key in ("hf", "moe", "ours")} | {"new": tmp_path / "new"}
    said = outcome([word.format(**places) for word in argv], capsys, monkeypatch)
    assert said.code == code and "Traceback" not in said.err
    assert words in said.err, said.err
    assert not any(tmp_path.iterdir())


def test_verify_names_every_flipped_bit(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 single-bit flips over all files: 60 times exit code 1 or 2, and a damaged tensor is named."""
    directory = tmp_path / "copy"
    shutil.copytree(sources / "ours", directory)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    random = np.random.default_rng(0)
    for trial in range(60):
        file = files[trial % len(files)]
        healthy = file.read_bytes()
        byte = int(random.integers(len(healthy)))
        flip(file, byte, int(random.integers(8)))
        said = outcome(["verify", str(directory)], capsys, monkeypatch)
        assert said.code == (2 if file.name == "manifest.json" else 1), (file, byte, said)
        assert file.name in said.out + said.err
        file.write_bytes(healthy)
    length = struct.unpack("<Q", (directory / WEIGHTS).read_bytes()[:8])[0]
    flip(directory / WEIGHTS, 8 + length + 5)
    said = outcome(["verify", str(directory)], capsys, monkeypatch)
    assert said.code == 1 and "blocks.0.attn.k_proj.weight: its bytes in model.safetensors have" in said.out
    flip(directory / WEIGHTS, 8 + length + 5)
    (directory / "config.json").unlink()
    said = outcome(["verify", str(directory)], capsys, monkeypatch)
    assert said.code == 1 and "config.json: missing" in said.out
