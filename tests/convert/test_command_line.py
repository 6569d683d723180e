"""`python -m convert` as a person meets it: what it says is so, what it proves bites, nothing is lost."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from command_line import MODELS, Arrays, Convert, drawn, foreign, ours, weights  # noqa: E402
from gptoss_files import bits, is_buffer  # noqa: E402
from helpers import random_params, tiny  # noqa: E402
from safetensors.torch import load_file as load_torch_file  # noqa: E402
from safetensors.torch import save_file as save_torch_file  # noqa: E402

from convert import __main__ as entry_point  # noqa: E402
from convert import gguf_file, prove, stream  # noqa: E402
from convert.targets import open_target  # noqa: E402
from convert.writers import WRITERS  # noqa: E402
from experiments import parity, sample  # noqa: E402
from jaxlm.config import ModelConfig, load  # noqa: E402
from jaxlm.tensor_file import Lazy, Planned  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]


LINE = re.compile(r"(\S+?)(\[[^\]]*\])? (\[[\d, ]*\]) -> (\S+?)(\[[^\]]*\])? (\[[\d, ]*\])  (\w+)  .+")


def tensors_of(directory: Path, format: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a format's file holds, as its own library reads it."""
    if format == "gguf":
        from gguf import GGUFReader

        found = GGUFReader(directory / "model.gguf").tensors
        return {t.name: tuple(int(n) for n in reversed(t.shape)) for t in found}
    if format in ("pt", "gptoss"):
        content = torch.load(directory / "model.pt", weights_only=True)
        state = content["model"] if format == "gptoss" else content
        return {k: tuple(x.shape) for k, x in state.items() if not is_buffer(k)}
    return {k: x.shape for k, x in weights(directory).items()}


@pytest.mark.parametrize("format", ["jaxlm", "hf", "torch", "pt", "gguf", "gptoss", "import"])
def test_dry_run_lists_what_would_be_written(
    format: str, sources: Path, tmp_path: Path, convert: Convert
) -> None:
    """Each tensor of the format once, with both names and shapes; together they are each of ours, whole; no file."""
    source = sources / "gptoss" / "latest.pt" if format == "gptoss" else sources / "moe"
    if format == "import":
        source = foreign(tmp_path / "hf", MODELS["moe"], drawn("moe"), layout="fused")
    before = sorted(p.name for p in tmp_path.iterdir())
    words = ["import", source] if format == "import" else ["export", source, "--to", format]
    said = convert(*words, tmp_path / "new", "--dry-run")
    assert sorted(p.name for p in tmp_path.iterdir()) == before and "nothing was written" in said.err
    rows = [LINE.fullmatch(line) for line in said.out.splitlines()]
    assert all(rows), said.out
    sides: list[dict[str, list[str]]] = [{}, {}]
    for row in rows:
        for side, (name, index, shape) in zip(sides, (row.groups()[:3], row.groups()[3:6]), strict=True):  # type: ignore[union-attr]
            assert index not in side.get(name, []), f"{name}{index} stands twice"
            side.setdefault(name, []).append(shape if index is None else index)
    convert(*words, tmp_path / "new")
    here, there = sides if format != "import" else reversed(sides)
    actual = tensors_of(tmp_path / "new" if format != "import" else source, format.replace("import", "hf"))
    assert there.keys() == actual.keys()
    assert all(there[name] == [str(list(shape))] for name, shape in actual.items())
    held = {k: t.shape for k, t in open_target(source).contents.tensors.items()}
    assert here.keys() == held.keys()
    assert all(pieces == [str(list(held[k]))] for k, pieces in here.items() if len(pieces) == 1)
    again = convert(*words, tmp_path / "new", "--dry-run", code=2)
    assert "is there already" in again.err, "it refuses what writing would refuse"


HEALTHY = {
    "jaxlm": ["--to", "jaxlm"],
    "hf": ["--to", "hf"],
    "torch": ["--to", "torch"],
    "gguf": ["--to", "gguf", "--dtype", "bfloat16"],  # norms stay float32: no false alarm
    "onnx": ["--to", "onnx"],
}


@pytest.mark.parametrize("format", HEALTHY)
def test_parity_passes_on_a_healthy_export(
    format: str, sources: Path, tmp_path: Path, convert: Convert
) -> None:
    """Exit code 0, the report on standard error, `parity` in the manifest."""
    if format in ("onnx", "gguf"):
        pytest.importorskip("onnxruntime" if format == "onnx" else "gguf")
    said = convert("export", sources / "dense", tmp_path / "new", *HEALTHY[format], "--parity")
    assert " agree" in said.err and said.out == ""
    facts = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert facts["parity"] is True and facts["source"] == {"kind": "run", "path": "dense"}
    assert facts["format"] == format


def test_parity_knows_what_says_nothing(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A width that no layer has, a cycle spelled out and what only training reads are no differences."""
    monkeypatch.setattr(prove, "RUNGS", ("config", "tree"))
    config = tiny({"pattern": (True, True), "balance": "layer_sum"}, d_ff=40, windows=(9, 9), n_layers=2)
    source = ours(tmp_path / "source", config, random_params(config, dtype=np.float32))
    convert("export", source, tmp_path / "hf", "--to", "hf", "--parity")
    back = load(ModelConfig, tmp_path / "source" / "config.json")
    assert back == config and "sliding_window" in (tmp_path / "hf" / "config.json").read_text()


def test_parity_is_refused_where_it_cannot_be(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """Before anything is written."""
    words = ["gguf", "--dtype", "q8_0"]
    for more in ((), ("--dry-run",)):
        said = convert(
            "export", sources / "dense", tmp_path / "new", "--parity", "--to", *words, *more, code=2
        )
        assert "--parity" in said.err and not any(tmp_path.iterdir())


def one_value(out: Path) -> None:
    """The smallest change there is, of one weight."""
    raw = load_torch_file(out / "model.safetensors")
    name = next(name for name in raw if "down_proj" in name)
    raw[name].view(torch.int32)[0, 0] += 1
    save_torch_file(raw, out / "model.safetensors", metadata={"format": "pt"})


def other_theta(out: Path) -> None:
    """A config that says the class's default."""
    facts = json.loads((out / "config.json").read_text())
    facts |= {"rope_theta": 10_000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    (out / "config.json").write_text(json.dumps(facts))


def graph_weight(out: Path) -> None:
    """One matrix of the graph, 1 % off."""
    import onnx

    graph = onnx.load(out / "model.onnx")
    tensor = next(t for t in graph.graph.initializer if "down_proj" in t.name)
    tensor.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name)
    )
    onnx.save(graph, out / "model.onnx")


@pytest.mark.parametrize(
    ("format", "damage", "words"),
    [
        ("hf", one_value, "mlp.down_proj.weight"),
        ("hf", other_theta, "rope_theta"),
        ("torch", one_value, "mlp.down_proj.weight"),
        ("onnx", graph_weight, "DISAGREE"),
    ],
)
def test_parity_stops_what_is_another_model(
    format: str,
    damage: Callable[[Path], None],
    words: str,
    sources: Path,
    tmp_path: Path,
    convert: Convert,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of the writer is named, exit code 1, and no directory is left."""
    healthy = WRITERS[format]

    def faulty(target: Any, out: Path, *rest: Any) -> Any:
        written = healthy(target, out, *rest)
        damage(out)
        return written

    monkeypatch.setitem(WRITERS, format, faulty)
    said = convert("export", sources / "dense", tmp_path / "new", "--to", format, "--parity", code=1)
    assert words in said.err and "was not written" in said.err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_parity_sees_a_fault_of_the_table(
    format: str, sources: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in another order on the way there only: the rungs see it."""
    right = stream.there

    def wrong(pairs: Any, tensors: Any, dtype: Any = None) -> dict[str, Planned]:
        plans = right(pairs, tensors, dtype)
        name = next((n for n in plans if "self_attn.q_proj" in n or "attn_q" in n), None)
        if name is None:  # ours, on the way to the comparison
            return plans
        rolled = np.roll(stream.array(plans[name]), 6, axis=0)
        return plans | {name: Planned.of(Lazy.of(rolled))}

    monkeypatch.setattr(stream if format == "hf" else gguf_file, "there", wrong)
    said = convert("export", sources / "dense", tmp_path / "new", "--to", format, "--parity", code=1)
    assert "blocks.0.attn.q_proj.weight" in said.err or "layer 0, attn.q_proj.weight" in said.err
    assert not any(tmp_path.iterdir())


def test_overwrite_replaces_results_and_nothing_else(
    sources: Path, tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off, it refuses; on, it replaces what import or export wrote, never a run, a source or somebody's folder."""
    run, new = shutil.copytree(sources / "dense", tmp_path / "run"), tmp_path / "new"
    convert("export", run, new, "--to", "torch")
    said = convert("export", run, new, "--to", "hf", code=2)
    assert "--overwrite" in said.err and (new / "training.json").exists()
    monkeypatch.chdir(tmp_path)
    convert("export", "run", "new/", "--to", "hf", "--overwrite")
    assert "llama" in (new / "config.json").read_text() and not (new / "training.json").exists()
    convert("export", "run", "run/inside", "--to", "torch")  # within the source there is room
    for destination, words in ((run, "holds what is read"), (tmp_path, "holds what is read")):
        said = convert("export", run, destination, "--to", "hf", "--overwrite", code=2)
        assert words in said.err
    said = convert("export", new, run, "--to", "torch", "--overwrite", code=2)
    assert "was not written by import or export" in said.err and (run / "checkpoints").is_dir()
    monkeypatch.chdir(new)
    convert("export", ".", "../gguf", "--to", "gguf")
    assert json.loads((tmp_path / "gguf" / "manifest.json").read_text())["source"]["path"] == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gguf", "new", "run"], "nothing hidden is left"


def test_inspect_says_what_there_is_and_what_it_can_become(
    sources: Path, tmp_path: Path, convert: Convert
) -> None:
    """Kind, parameters, dtypes, step, tokenizer, configuration; of what it cannot become, why."""
    said = convert("inspect", sources / "dense")
    assert (
        said.out.startswith(f"{sources / 'dense'}: run\nparameters: 18,696 in 12 tensors\n") and not said.err
    )
    for line in (
        "stored as float32, 74.8 kB",
        "optimizer state: step 2",
        "tokenizer: 270 ids",
        "  rope_theta: 50000.0",
        "  hf: yes, llama, 12 tensors",
        "  gguf: yes",
    ):
        assert line in said.out.splitlines(), line
    no = next(line for line in said.out.splitlines() if line.startswith("  gptoss: no: "))
    assert "mlp='swiglu'" in no and ":;" not in no
    convert("export", sources / "dense", tmp_path / "new", "--to", "gguf", "--dtype", "float16")
    said = convert("inspect", tmp_path / "new", "--tensors")
    assert "model.gguf: gguf\n" in said.out and "stored as float16, float32, " in said.out
    assert "blocks.0.attn.q_proj.weight  [24, 36]  float16" in said.out.splitlines()
    said = convert("inspect", sources / "gptoss" / "latest.pt")
    assert ": gptoss\n" in said.out and "optimizer state: step 7" in said.out
    assert "  hf: no: " in said.out and "  gptoss: yes" in said.out.splitlines()


@pytest.mark.parametrize("format", ["torch", "gguf", "pt"])
def test_verify_is_content_until_something_changes(
    format: str, sources: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture
) -> None:
    """Exit code 0, then 1 and the name of the tensor (of a .pt: of the file)."""
    new = tmp_path / "new"
    convert("export", sources / "dense", new, "--to", format)
    said = convert("verify", new)
    count = {"torch": 36, "gguf": 12, "pt": 0}[format]
    assert f"{count} tensors in " in said.out and said.out.endswith("all as written\n")
    file = new / {"torch": "model.safetensors", "gguf": "model.gguf", "pt": "model.pt"}[format]
    raw = bytearray(file.read_bytes())
    raw[-5_000] ^= 1
    file.write_bytes(raw)
    # Not by `convert`, whose failures speak on standard error: a damage is verify's result.
    assert entry_point.main(["verify", str(new)]) == 1
    damaged = capsys.readouterr().out.splitlines()
    assert re.match(r"[\w.]+: (its bytes in \S+ have|has) changed", damaged[0]) and damaged[-1].endswith(
        "1 DAMAGED"
    )
    assert format == "pt" or damaged[0].split(":")[0] in tensors_of(new, format)


def test_help_is_there(convert: Convert) -> None:
    """Without words: the commands; `--help` of each names its options with their meaning."""
    assert (
        "python -m convert export TARGET --to hf DST"
        in subprocess.run(
            [sys.executable, "-m", "convert"], cwd=ROOT, capture_output=True, text=True, timeout=60
        ).stdout
    )
    for name, option in (
        ("inspect", "--tensors"),
        ("import", "--no-tokenizer"),
        ("export", "--to"),
        ("verify", ""),
    ):
        said = convert(name, "--help")
        assert f"python -m convert {name}" in said.out and option in said.out


def test_every_kind_of_target_says_the_same(
    sources: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Greedy text of jaxlm, hf, gguf and pt directories is the run's, of gptoss that of its import; once in JAX too."""

    def text(target: Path, framework: str = "torch") -> bytes:
        words = [str(target), "--prompt", "ab", "--greedy", "--max-new-tokens", "8", "--framework", framework]
        capfdbinary.readouterr()
        assert sample.main(words) == 0
        return capfdbinary.readouterr().out

    dense, gptoss = sources / "dense", sources / "gptoss" / "latest.pt"
    assert text(dense, "jax") == text(dense)
    for source, formats in ((dense, ("jaxlm", "hf", "gguf", "pt")), (gptoss, ("jaxlm",))):
        expected = text(source)
        assert len(expected) > 3
        for format in formats:
            out = tmp_path / f"{source.name}.{format}"
            assert entry_point.main(["export", str(source), str(out), "--to", format]) == 0
            assert text(out) == expected
            if format == "hf":
                assert text(out, "jax") == expected


@pytest.mark.parametrize("format", ["jaxlm", "hf", "gguf"])
def test_every_kind_of_target_is_compared(
    format: str, sources: Path, tmp_path: Path, convert: Convert
) -> None:
    """experiments.parity takes it, on either side, and finds the run's weights in it."""
    out, report = tmp_path / "new", tmp_path / "report"
    convert("export", sources / "dense", out, "--to", format)
    words = ["--rungs", "config,tree", "--out", str(report)]
    sides = (str(out), str(sources / "dense"))
    one, other = sides if format != "hf" else reversed(sides)
    assert parity.main([one, "--against", other, *words]) == 0


def llama2_tokenizer(path: Path) -> None:
    """As Llama 2 has it: pieces of text, with bytes for what has none."""
    specials = ("<unk>", "<s>", "</s>")
    vocab = {
        text: i for i, text in enumerate((*specials, *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a"))
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    facts = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": True} for i, text in enumerate(specials)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": ["▁ a"]},
    }
    path.write_text(json.dumps(facts), encoding="utf-8")


def test_a_tokenizer_that_is_not_ours_is_carried_along(tmp_path: Path, convert: Convert) -> None:
    """In and out byte for byte, said by inspect; GGUF names the reason, --no-tokenizer goes without."""
    source, there = foreign(tmp_path / "source", MODELS["dense"], drawn("dense")), tmp_path / "there"
    llama2_tokenizer(source / "tokenizer.json")
    convert("import", source, there)
    convert("export", there, tmp_path / "back", "--to", "hf")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    for target in (source, there):
        said = convert("inspect", target)
        assert "tokenizer: is carried over as it is, but cannot be used here: " in said.out
        assert re.search("gguf: yes, without its tokenizer: .*normalizer", said.out)
        for more in ((), ("--dry-run",)):
            said = convert("export", target, tmp_path / "new", "--to", "gguf", *more, code=2)
            assert "normalizer Sequence is not supported" in said.err and "--no-tokenizer" in said.err
    convert("export", there, tmp_path / "new", "--to", "gguf", "--no-tokenizer")
    assert bits(tensor_bits(tmp_path / "new")) == bits(drawn("dense"))


def tensor_bits(directory: Path) -> Arrays:
    """A target's weights in our names."""
    return {k: t.read() for k, t in open_target(directory).contents.tensors.items()}


def test_float64_needs_no_flag_of_jax(
    sources: Path, tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture
) -> None:
    """Import, export, --parity and sampling of float64 weights work as they are."""
    params = random_params(MODELS["dense"], dtype=np.float64)
    source, there = foreign(tmp_path / "source", MODELS["dense"], params), tmp_path / "there"
    shutil.copyfile(sources / "dense" / "tokenizer.json", source / "tokenizer.json")
    convert("import", source, there, "--parity")
    assert bits(weights(there)) == bits(params)
    convert("export", there, tmp_path / "back", "--to", "hf")
    assert bits(weights(tmp_path / "back")) == bits(weights(source))
    for more in ([], ["--dtype", "float64"]):
        capsys.readouterr()
        assert sample.main([str(there), "--prompt", "a", "--max-new-tokens", "4", "--greedy", *more]) == 0
        assert capsys.readouterr().out.startswith("a")


def test_mixed_dtypes_survive(tmp_path: Path, convert: Convert) -> None:
    """bfloat16 weights beside float32 norms and routers, there and back."""
    mixed = {
        k: x if "norm" in k or "router" in k else x.astype(ml_dtypes.bfloat16)
        for k, x in drawn("moe").items()
    }
    source = foreign(tmp_path / "source", MODELS["moe"], mixed)
    convert("import", source, tmp_path / "there")
    assert bits(weights(tmp_path / "there")) == bits(mixed)
    convert("export", tmp_path / "there", tmp_path / "back", "--to", "hf")
    assert bits(weights(tmp_path / "back")) == bits(weights(source))


def test_two_sets_of_weights_are_not_guessed_at(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """model.safetensors beside an index: of ours refused, of Hugging Face read as transformers reads it, and said."""
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    mine = ours(tmp_path / "ours", MODELS["dense"], drawn("dense"))
    theirs = foreign(tmp_path / "theirs", MODELS["dense"], drawn("dense"))
    for directory in (mine, theirs):
        (directory / "model.safetensors.index.json").write_text(index)
    said = convert("import", mine, tmp_path / "new", code=2)
    assert "both model.safetensors and model.safetensors.index.json" in said.err
    said = convert("import", theirs, tmp_path / "new")
    assert "note: model.safetensors was read" in said.err
    assert bits(weights(tmp_path / "new")) == bits(drawn("dense"))
