"""Every route of a model through `python -m convert`: the same bits at the end, and each tool opens its own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from command_line import MODELS, Convert, drawn, foreign, negated, ours, weights  # noqa: E402
from gptoss_files import adam_state, bits, is_buffer  # noqa: E402
from helpers import hard_batch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from safetensors.torch import load_file as load_torch_file  # noqa: E402

from convert.native import build_torch  # noqa: E402
from convert.optstate import AdamMoments, moments_to_torch, torch_moments  # noqa: E402
from convert.targets import open_target  # noqa: E402
from convert.tree import to_tensor  # noqa: E402
from jaxlm.config import ModelConfig, RunConfig, TrainConfig, load  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402
from torchref import optim as twin_optim  # noqa: E402
from torchref import train as twin  # noqa: E402
from torchref.checkpoint import load_model, load_training  # noqa: E402

pytestmark = pytest.mark.torch


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
