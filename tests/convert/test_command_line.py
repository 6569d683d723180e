"""Every route through `python -m convert`: the same bits at the end, each tool opens its own, what is said is so."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from entry import Outcome  # noqa: E402
from gptoss_files import Sizes, adam_state, bits, checkpoint, is_buffer  # noqa: E402
from gptoss_files import save as save_pt  # noqa: E402
from helpers import hard_batch, random_params, tiny  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from safetensors.torch import load_file as load_torch_file  # noqa: E402
from safetensors.torch import save_file as save_torch_file  # noqa: E402

from convert import __main__ as entry_point  # noqa: E402
from convert import gguf_file, hf, prove, stream  # noqa: E402
from convert.native import build_torch  # noqa: E402
from convert.optstate import AdamMoments, moments_to_torch, torch_moments  # noqa: E402
from convert.targets import open_target  # noqa: E402
from convert.tree import to_tensor  # noqa: E402
from convert.writers import WRITERS  # noqa: E402
from experiments import parity, sample  # noqa: E402
from jaxlm import optim  # noqa: E402
from jaxlm.checkpoint import Checkpoints  # noqa: E402
from jaxlm.cli import main_guard  # noqa: E402
from jaxlm.config import ModelConfig, RunConfig, TrainConfig, load, save  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.tensor_file import Lazy, Planned, write_file  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402
from jaxlm.train import init_state  # noqa: E402
from torchref import optim as twin_optim  # noqa: E402
from torchref import train as twin  # noqa: E402
from torchref.checkpoint import load_model, load_training  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"n_layers": 1, "vocab_size": 280, "context": 64}  # 10 more ids than the tokenizer has
MODELS = {"dense": tiny(init="fan_in", **SIZES), "moe": tiny({"d_ff": 0}, d_ff=20, init="fan_in", **SIZES)}
GPTOSS = Sizes(V=280, L=1, C=64)
Arrays = dict[str, np.ndarray]
Convert = Callable[..., Outcome]


def drawn(name: str, seed: int = 0) -> Arrays:
    """The weights of a run's best checkpoint (0), its moments (1, 2), by parameter path; the latest weights are -0."""
    params = random_params(MODELS[name], seed, dtype=np.float32)
    return params if seed == 0 else {path: np.abs(x) * 1e-3 for path, x in params.items()}


def make_run(path: Path, name: str) -> None:
    """A run directory: two checkpoints, of which the first is the best, with moments and a tokenizer."""
    path.mkdir()
    directory, config = RunDir(path), RunConfig(MODELS[name], train=TrainConfig(seq_len=16))
    save(config, directory.config)
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(directory.tokenizer)
    m, v, params = ({k: jnp.asarray(x) for k, x in drawn(name, seed).items()} for seed in (1, 2, 0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: init_state(config)))
    chain = tuple(optim.AdamState(m, v) if isinstance(s, optim.AdamState) else s for s in state.opt_state)
    state = state._replace(step=jnp.int32(1), params=params, opt_state=chain)
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(1, state, {}, metric=1.0)
    checkpoints.save(
        2, state._replace(step=jnp.int32(2), params={k: -x for k, x in params.items()}), {}, metric=2.0
    )
    checkpoints.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense and moe: runs; gptoss: latest.pt with moments, and a tokenizer beside it."""
    root = tmp_path_factory.mktemp("sources")
    for name in MODELS:
        make_run(root / name, name)
    (root / "gptoss").mkdir()
    sizes = {"context_length": 64, "vocabulary_size": 280, "transformer_blocks": 1}
    save_pt(root / "gptoss", checkpoint(GPTOSS, moments=True, cfg=sizes))
    shutil.copyfile(root / "dense" / "tokenizer.json", root / "gptoss" / "tokenizer.json")
    return root


@pytest.fixture
def convert(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """`python -m convert WORDS` in this process; `code` is what it must exit with."""

    def call(*words: object, code: int = 0) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main_guard(entry_point.main, failures=(entry_point.CheckFailed,))
        captured = capsys.readouterr()
        said = Outcome(int(stop.value.code or 0), captured.out, captured.err)
        assert said.code == code, said.err
        assert "Traceback" not in said.err and (code == 0 or said.err.strip())
        return said

    return call


def weights(directory: Path) -> Arrays:
    """Every tensor of a directory's weights, by the format's own library; bfloat16 as such."""
    found: dict[str, Any] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= load_torch_file(file)
    return {
        name: t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        if t.dtype == torch.bfloat16
        else t.numpy()
        for name, t in found.items()
    }


def ours(directory: Path, config: ModelConfig, params: Mapping[str, np.ndarray]) -> Path:
    """A model directory of jaxlm's."""
    directory.mkdir()
    write_file(
        directory / "model.safetensors",
        {k: Planned.of(Lazy.of(x)) for k, x in params.items()},
        {"format": "jaxlm"},
    )
    save(config, directory / "config.json")
    return directory


def foreign(directory: Path, config: ModelConfig, params: Mapping[str, np.ndarray], **more: Any) -> Path:
    """A Hugging Face directory."""
    directory.mkdir()
    hf.write(directory, config, {k: Lazy.of(x) for k, x in params.items()}, **more)
    return directory


def negated(params: Arrays) -> Arrays:
    """The latest checkpoint's weights from the best one's."""
    return {path: -x for path, x in params.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["jaxlm", "hf", "torch", "gguf"])
def test_there_and_back_keeps_every_bit(
    format: str, name: str, sources: Path, tmp_path: Path, convert: Convert
) -> None:
    """run -> FORMAT -> jaxlm: weights, configuration and tokenizer; moments and step where the format has a place."""
    run, there, back = sources / name, tmp_path / "there", tmp_path / "back"
    convert("export", f"{run}/", f"{there}/", "--to", format)
    convert("import", there, back)
    assert bits(weights(back)) == bits(negated(drawn(name)))
    for slot, seed in {"jaxlm": {"m": 1, "v": 2}, "torch": {"exp_avg": 1, "exp_avg_sq": 2}}.get(
        format, {}
    ).items():
        moment = load_file(there / "optimizer.safetensors")[f"{slot}:embed.weight"]
        assert np.array_equal(moment, drawn(name, seed)["embed.weight"]), slot
    found = load(ModelConfig, back / "config.json")
    assert dataclasses.replace(found, init=MODELS[name].init, init_std=MODELS[name].init_std) == MODELS[name]
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    assert Tokenizer.load(back / "tokenizer.json").encode("abcd ab") == tokenizer.encode("abcd ab")
    if format != "gguf":  # which keeps a tokenizer in words of its own
        assert (back / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    moments = open_target(back).contents.moments
    if format in ("hf", "gguf"):
        assert moments is None and not (back / "optimizer.safetensors").exists()
        return
    assert moments is not None and moments.step == 2
    assert bits({k: x.read() for k, x in moments.m.items()}) == bits(drawn(name, 1))
    assert bits({k: x.read() for k, x in moments.v.items()}) == bits(drawn(name, 2))
    convert("export", run, tmp_path / "bare", "--to", format, "--no-optimizer")
    assert not (tmp_path / "bare" / "optimizer.safetensors").exists()


def test_an_imported_model_goes_back_as_it_came(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """hf -> jaxlm -> hf: every tensor, every key of the config, every other file byte for byte."""
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    foreign(source, MODELS["moe"], drawn("moe"), tokenizer=Tokenizer.load(sources / "moe" / "tokenizer.json"))
    facts = json.loads((source / "config.json").read_text()) | {
        "use_cache": False,
        "transformers_version": "4",
    }
    (source / "config.json").write_text(json.dumps(facts, indent=3))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class":   "PreTrainedTokenizerFast"}')
    convert("import", source, there)
    assert (there / "source" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    convert("import", there, tmp_path / "again")  # what was kept is kept once more
    convert("export", tmp_path / "again", back, "--to", "hf")
    assert bits(weights(back)) == bits(weights(source))
    assert json.loads((back / "config.json").read_text()) == facts
    kept = {p.name for p in source.iterdir()} - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "generation_config.json"} < kept
    for name in kept:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    convert("import", source, tmp_path / "bare", "--no-tokenizer")
    assert {p.name for p in (tmp_path / "bare" / "source").iterdir()} == {
        "config.json",
        "generation_config.json",
    }
    convert("import", source, tmp_path / "half", "--dtype", "bfloat16")
    kept_config = json.loads((tmp_path / "half" / "source" / "config.json").read_text())
    assert kept_config["dtype"] == kept_config["torch_dtype"] == "bfloat16"
    convert("export", tmp_path / "half", tmp_path / "half.hf", "--to", "hf")
    facts |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "half.hf" / "config.json").read_text()) == facts


def test_gptoss_there_and_back_with_its_optimizer(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """.pt -> jaxlm -> .pt: weights, moments, step and tokenizer; without --optimizer the moments stay behind."""
    there, back = tmp_path / "there", tmp_path / "back"
    original = torch.load(sources / "gptoss" / "latest.pt", weights_only=True)
    convert("import", sources / "gptoss" / "latest.pt", there)
    assert (there / "tokenizer.json").read_bytes() == (sources / "gptoss" / "tokenizer.json").read_bytes()
    convert("export", there, back, "--to", "gptoss")
    found = torch.load(back / "model.pt", weights_only=True)
    named = {k: x for k, x in original["model"].items() if not is_buffer(k)}
    assert bits({k: found["model"][k] for k in named}) == bits(named) and found["step"] == 7
    wanted = adam_state(original["model"], 7, torch.float32)["state"]
    assert len(wanted) == len(found["optimizer"]["state"]) > 0
    for index, entry in wanted.items():
        assert bits(found["optimizer"]["state"][index]) == bits(entry)
    convert("import", back, tmp_path / "again")
    for file in ("model.safetensors", "optimizer.safetensors", "training.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (there / file).read_bytes(), file
    convert("export", there, tmp_path / "bare", "--to", "gptoss", "--no-optimizer")
    assert torch.load(tmp_path / "bare" / "model.pt", weights_only=True)["optimizer"]["state"] == {}


def test_a_run_goes_on_in_torch(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """run -> jaxlm -> torch: `load_training` takes weights, moments and step, and a step ends where it should."""
    convert("export", sources / "dense", tmp_path / "jaxlm", "--to", "jaxlm")
    convert("export", tmp_path / "jaxlm", tmp_path / "torch", "--to", "torch")
    run = RunConfig(MODELS["dense"], train=TrainConfig(seq_len=19))
    state, _ = load_training(twin.init_state(run), tmp_path / "torch")
    assert state.step == 2
    expected = moments_to_torch(run.model, AdamMoments(drawn("dense", 1), drawn("dense", 2), 2))
    found = torch_moments(state)
    assert bits(found.m) == bits(expected.m) and bits(found.v) == bits(expected.v) and found.step == 2
    batch = hard_batch(vocab=280)
    step = twin.make_train_step(run)
    numbers = twin_optim.scalars(run.optim, 2)
    after, metrics = step(state, twin.place_batch(batch), numbers)
    assert after.step == 3 and np.isfinite(float(metrics["loss"]))
    fresh = twin.init_state(run)
    model = build_torch(run.model, negated(drawn("dense")))
    optimizer = twin_optim.make_optimizer(run.optim, model)
    for path, p in model.named_parameters():
        slots = {"exp_avg": to_tensor(expected.m[path]), "exp_avg_sq": to_tensor(expected.v[path])}
        optimizer.state[p] = {"step": torch.tensor(2.0)} | slots
    other, _ = step(
        fresh._replace(step=2, model=model, optimizer=optimizer), twin.place_batch(batch), numbers
    )
    named = dict(other.model.named_parameters())
    assert all(torch.equal(p, named[path]) for path, p in after.model.named_parameters())


def test_pt_and_onnx_hold_the_weights(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """model.pt loads strictly into torchref's decoder; the graph's tensors are the same bits."""
    onnx = pytest.importorskip("onnx")
    for format in ("pt", "onnx", "torch"):
        convert("export", sources / "dense", tmp_path / format, "--to", format)
    expected = {k: p.detach() for k, p in load_model(tmp_path / "torch").named_parameters()}
    state = torch.load(tmp_path / "pt" / "model.pt", weights_only=True)
    assert bits(state) == bits(expected)
    q = "blocks.0.attn.q_proj.weight"
    assert np.array_equal(state[q].numpy(), -drawn("dense")[q].T)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    held = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name in expected}
    assert bits(held) == bits(expected)
    said = convert("import", tmp_path / "onnx", tmp_path / "new", code=2)
    assert "holds model.onnx" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_rounds_as_torch_does(dtype: str, tmp_path: Path, convert: Convert) -> None:
    """Ties, values beside ties, subnormals, signed zeros and the largest finite; infinity is refused, not written."""
    config, params = MODELS["dense"], drawn("dense")
    steps = np.float32(2.0) ** np.arange(-30, 15, dtype=np.float32)
    unit = np.float32(2**-8 if dtype == "bfloat16" else 2**-11)
    ties = np.concatenate([s * (1 + np.arange(1, 12, dtype=np.float32) * unit) for s in steps])
    hard = np.concatenate(
        [ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(0)), -ties]
    )
    extreme = np.array([0.0, -0.0, 65519.0, 1e-41, 5.9e-8, 2.98e-8, 2.99e-8], np.float32)
    hard = np.concatenate([hard, extreme])
    params["embed.weight"].reshape(-1)[: hard.size] = hard
    source = ours(tmp_path / "source", config, params)
    convert("export", source, tmp_path / "cast", "--to", "jaxlm", "--dtype", dtype)
    kind = getattr(torch, dtype)
    expected = {k: torch.from_numpy(x).to(kind) for k, x in params.items()}
    found = load_torch_file(tmp_path / "cast" / "model.safetensors")
    assert all(torch.equal(found[k].view(torch.int16), x.view(torch.int16)) for k, x in expected.items())
    convert("export", source, tmp_path / "hf", "--to", "hf", "--dtype", dtype)
    theirs = load_torch_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(theirs.view(torch.int16), expected["embed.weight"].view(torch.int16))
    params["embed.weight"][0, 0] = 65520.0 if dtype == "float16" else 3.4e38
    beyond = ours(tmp_path / "beyond", config, params)
    said = convert("export", beyond, tmp_path / "new", "--to", "jaxlm", "--dtype", dtype, code=2)
    assert f"embed.weight: 1 of 6720 values are not finite in {dtype}" in said.err
    assert not (tmp_path / "new").exists()


def test_best_is_another_checkpoint(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """--checkpoint best is the first of the run's two."""
    convert("export", sources / "dense", tmp_path / "best", "--to", "jaxlm", "--checkpoint", "best")
    assert bits(weights(tmp_path / "best")) == bits(drawn("dense"))
    assert open_target(tmp_path / "best").contents.moments.step == 1  # type: ignore[union-attr]


def test_shards_open_in_transformers_and_come_back(sources: Path, tmp_path: Path, convert: Convert) -> None:
    """No shard is over the limit unless one tensor is; transformers finds every key; ours come back bit for bit."""
    transformers = pytest.importorskip("transformers")
    for format in ("hf", "jaxlm"):
        out = tmp_path / format
        convert("export", sources / "dense", out, "--to", format, "--max-shard-gb", "2e-5")
        shards = sorted(out.glob("model-*.safetensors"))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(shards) > 2 and set(index["weight_map"].values()) == {p.name for p in shards}
        for shard in shards:
            tensors = load_file(shard)
            assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 20_000
    convert("verify", tmp_path / "hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    stored = weights(tmp_path / "hf")
    state = {k: x for k, x in model.state_dict().items() if k in stored}
    assert bits(state) == bits({k: stored[k] for k in state}) and len(state) == len(stored)
    for format in ("hf", "jaxlm"):
        convert("import", tmp_path / format, tmp_path / f"{format}.back")
        assert bits(weights(tmp_path / f"{format}.back")) == bits(negated(drawn("dense")))


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
    """Import, export and --parity of float64 work as they are; `sample` in JAX says what it needs."""
    params = random_params(MODELS["dense"], dtype=np.float64)
    source, there = foreign(tmp_path / "source", MODELS["dense"], params), tmp_path / "there"
    shutil.copyfile(sources / "dense" / "tokenizer.json", source / "tokenizer.json")
    convert("import", source, there, "--parity")
    assert bits(weights(there)) == bits(params)
    convert("export", there, tmp_path / "back", "--to", "hf")
    assert bits(weights(tmp_path / "back")) == bits(weights(source))
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample", str(there), "--prompt", "a"])
        capsys.readouterr()
        main_guard(sample.main)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "JAX_ENABLE_X64=1" in said.err and said.err.count("\n") == 1


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
