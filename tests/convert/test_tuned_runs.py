"""Runs that fine-tuned: they open as any target, an adapter merged into its base, and go out to transformers and peft;
an adapter meets no other base than its own.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import Arrays, random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

from convert import adapters, fingerprint, hf, peft_adapter  # noqa: E402
from convert.rules import ConversionError  # noqa: E402
from convert.targets import TargetError, open_target  # noqa: E402
from jaxlm.adapter_config import PROJECTIONS, AdapterConfig  # noqa: E402
from jaxlm.config import LogConfig, OptimConfig, TrainConfig, save  # noqa: E402
from jaxlm.engine import JaxEngine  # noqa: E402
from jaxlm.finetune.lora import freeze  # noqa: E402
from jaxlm.run_dir import RunDir  # noqa: E402
from jaxlm.tensor_file import Lazy  # noqa: E402
from jaxlm.tokenizer import Tokenizer  # noqa: E402
from jaxlm.tune_config import TuneConfig, TuneRun  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MODEL = tiny({"d_ff": 16, "balance": "none"}, init="fan_in", n_layers=1, vocab_size=280, context=64)
LORA = AdapterConfig(2, 6.0, targets=(*PROJECTIONS, r"lm_head\.weight"))
B, T = 2, 12
TEMPLATE = "{{ messages }}"
Convert = Callable[..., Any]


def write_base(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny Mixtral with a tokenizer in a Hugging Face directory."""
    path.mkdir(parents=True)
    config = dataclasses.replace(MODEL, **changes)
    hf.write(
        path, config, {name: Lazy.of(x) for name, x in random_params(config, seed, dtype=np.float32).items()}
    )
    Tokenizer.train(["ab abc abcd"] * 3, 270).save(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


def tune(base: Path, path: Path, adapter: AdapterConfig | None = LORA, steps: int = 0) -> Arrays:
    """A run by the library's own calls, from random values of what it trains; returns what came of it."""
    target, random = open_target(base), np.random.default_rng(3)
    run = TuneRun(
        target.config,
        optim=OptimConfig(lr=0.05, warmup_steps=1, decay_steps=2),
        train=TrainConfig(steps=2, batch_size=B, seq_len=T, plots=False),
        log=LogConfig(details=False),
        tune=TuneConfig("sft", str(base), adapter=adapter),
    )
    path.mkdir(parents=True)
    directory = RunDir(path)
    save(run, directory.config)
    adapters.keep_base(target, path, TEMPLATE, adapter is not None)
    engine = JaxEngine(run, directory.checkpoints)
    if adapter is not None:
        engine.freeze(freeze(run, target.contents.tensors))
    engine.initialise(
        {
            name: jnp.asarray(random.normal(size=s.shape) * 0.2, s.dtype)
            for name, s in engine.task.shapes.items()
        }
    )
    ids = random.integers(0, target.config.vocab_size, (B, T + 1)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": np.ones((B, T), np.float32)}
    for _ in range(steps):
        engine.train_step(batch)
    engine.save({}, 1.0)
    engine.wait()
    trained = {name: np.asarray(x) for name, x in engine.params.items()}
    if adapter is not None:
        adapters.write_run_adapter(run, trained, target, path / "adapter")
    return trained


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: Hugging Face directory; lora: a LoRA run on it."""
    root = tmp_path_factory.mktemp("tuned")
    write_base(root / "base")
    np.savez(root / "factors.npz", **tune(root / "base", root / "lora", steps=2))
    return root


def factors_of(home: Path) -> Arrays:
    """What the LoRA run trained."""
    with np.load(home / "factors.npz", allow_pickle=False) as held:
        return {name: held[name] for name in held}


def weights(target: Any) -> Arrays:
    """A target's, read."""
    return {path: np.asarray(tensor.read()) for path, tensor in target.contents.tensors.items()}


def logits_of(model: Any) -> np.ndarray:
    """Of a fixed batch, of transformers', peft's or torchref's model."""
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, MODEL.vocab_size, (2, T)))
    with torch.no_grad():
        out = model(ids)
    return (out[0] if isinstance(out, tuple) else out.logits).numpy()


def test_a_lora_run_is_its_base_with_the_adapter_merged(home: Path) -> None:
    """W + alpha / R * a b in every adapted weight, experts and head too; all others as they are, to the bit."""
    factors, base, tuned = factors_of(home), weights(open_target(home / "base")), open_target(home / "lora")
    assert all(np.abs(x).max() > 1e-3 for x in factors.values())
    merged = weights(tuned)
    assert merged.keys() == base.keys()
    for path, weight in base.items():
        if not LORA.adapts(path):
            assert np.array_equal(merged[path], weight)
            continue
        a, b = (factors[f"{path}.{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
        assert relative_error(merged[path], weight + 3.0 * (a @ b)) < 1e-6
        assert not np.array_equal(merged[path], weight)
    assert tuned.contents.moments is None and "merged with the adapter" in tuned.contents.notes[-1]
    by_torch, by_jax = tuned.decoder.state_dict(), tuned.params
    name = "blocks.0.attn.q_proj.weight"
    assert np.array_equal(by_torch[name].numpy().T, merged[name]) and np.array_equal(
        by_jax[name], merged[name]
    )
    assert tuned.specials.chat_template == TEMPLATE and tuned.tokenizer.vocab_size == 270


def test_a_run_on_a_lora_run_or_on_an_adapter_counts_it_merged(home: Path, tmp_path: Path) -> None:
    """Adapters on adapters: each is added to what the one before made; where the base of the base is, is known."""
    first = weights(open_target(home / "lora"))
    for base in (home / "lora", home / "lora" / "adapter"):
        assert all(np.array_equal(x, first[path]) for path, x in weights(open_target(base)).items())
        run = tmp_path / base.name
        factors = tune(base, run, AdapterConfig(1, 1.0))
        merged = peft_adapter.merge(first, factors, AdapterConfig(1, 1.0))
        for name in (run, run / "adapter"):
            again = weights(open_target(name))
            assert all(np.array_equal(again[path], x) for path, x in merged.items())


def test_an_adapter_merged_before_training_is_part_of_the_base(home: Path, tmp_path: Path) -> None:
    """The run says only the base; base.json says what was merged into it."""
    base = open_target(home / "base")
    given = adapters.merged(base, adapters.open_adapter(home / "lora", base))
    run = tmp_path / "run"
    shutil.copytree(home / "lora", run)
    adapters.keep_base(given, run)
    once, twice = weights(given), weights(open_target(run))
    expected = peft_adapter.merge(once, factors_of(home), LORA)
    assert all(np.array_equal(twice[path], x) for path, x in expected.items())


def test_a_full_fine_tuning_run_opens_as_any_run(home: Path, tmp_path: Path, convert: Convert) -> None:
    """Its own weights and moments; the base may be gone, its tokenizer's files go along."""
    base = write_base(tmp_path / "base")
    trained = tune(base, tmp_path / "run", None)
    shutil.rmtree(base)
    target = open_target(tmp_path / "run")
    assert all(np.array_equal(x, trained[path]) for path, x in weights(target).items())
    assert target.contents.moments is not None and target.contents.moments.step == 0
    convert("export", tmp_path / "run", tmp_path / "hf", "--to", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert relative_error(logits_of(model), logits_of(target.decoder)) < tolerance("f32_transformers")
    assert "chat_template" in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())


def test_a_merged_export_opens_in_transformers_and_the_bare_one_in_peft(
    home: Path, tmp_path: Path, convert: Convert
) -> None:
    """Both have the logits of the run; the bare adapter holds the factors to the bit."""
    peft = pytest.importorskip("peft")
    expected = logits_of(open_target(home / "lora").decoder)
    said = convert("export", home / "lora", tmp_path / "hf", "--to", "hf")
    assert "merged with the adapter" in said.err
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert relative_error(logits_of(model), expected) < tolerance("f32_transformers")
    convert("export", home / "lora", tmp_path / "peft", "--to", "peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(home / "base").eval()
    assert relative_error(logits_of(plain), expected) > 1e-2
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "peft"))
    assert relative_error(logits_of(adapted), expected) < tolerance("f32_transformers")
    convert("export", home / "lora" / "adapter", tmp_path / "again", "--to", "peft")
    files = [(tmp_path / name / peft_adapter.TENSORS).read_bytes() for name in ("peft", "again")]
    assert files[0] == files[1]
    back = adapters.open_adapter(tmp_path / "peft", open_target(home / "base"))
    assert all(back.factors[name].tobytes() == x.tobytes() for name, x in factors_of(home).items())


def test_inspect_tells_what_a_lora_run_trained(home: Path, convert: Convert) -> None:
    """Rank, weights, parameters and base."""
    said = convert("inspect", home / "lora")
    count = sum(x.size for x in factors_of(home).values())
    assert f"adapter: rank 2 on 7 weights, {count:,} parameters; base {home / 'base'}" in said.out


def test_a_lora_run_whose_base_is_gone_or_another_is_refused_in_one_line(
    home: Path, tmp_path: Path, convert: Convert
) -> None:
    """Gone, of another shape, one weight changed by a percent; a copy in half precision passes."""
    run, base = tmp_path / "lora", tmp_path / "base"
    shutil.copytree(home / "lora", run)
    facts = json.loads((run / "config.json").read_text())
    facts["tune"]["base"] = str(base)
    (run / "config.json").write_text(json.dumps(facts))
    kept = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps(kept | {"base": ""}))

    def refused(*words: str) -> None:
        said = convert("export", run, tmp_path / "new", "--to", "hf", code=2)
        assert all(word in said.err for word in words) and len(said.err.strip().splitlines()) == 1, said.err
        assert not (tmp_path / "new").exists()

    refused(str(base), "does not exist")
    convert("export", run, tmp_path / "bare", "--to", "peft")  # needs no base
    write_base(base, n_heads=2, n_kv_heads=2)
    refused("another model now", "n_heads is 2, expected 6")
    shutil.rmtree(base)
    changed = random_params(MODEL, dtype=np.float32)
    changed["blocks.0.moe.router.weight"] *= 1.01
    base.mkdir()
    hf.write(base, MODEL, {name: Lazy.of(x) for name, x in changed.items()})
    refused("another model now", "router", "sampled values differ")
    shutil.rmtree(base)
    convert("export", home / "base", base, "--to", "hf", "--dtype", "bfloat16")
    open_target(run).contents
    shutil.rmtree(base)
    convert("export", home / "base", base, "--to", "hf", "--dtype", "float16")
    open_target(run).contents


def test_an_adapter_for_another_base_is_refused_in_one_line(
    home: Path, tmp_path: Path, convert: Convert
) -> None:
    """By its configuration, or by the values of equally shaped weights; an adapter.json of before still opens."""
    other = write_base(tmp_path / "other", seed=1)
    smaller = write_base(tmp_path / "smaller", d_model=12)
    adapter = home / "lora" / "adapter"
    for base, word in {other: "sampled values differ", smaller: "d_model is 12, expected 24"}.items():
        said = convert("export", base, tmp_path / "new", "--to", "hf", "--adapter", adapter, code=2)
        assert word in said.err and "another model" in said.err and len(said.err.strip().splitlines()) == 1
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    facts = json.loads((old / "adapter.json").read_text())
    for name in ("base", "checkpoint", "merged", "sketch"):
        del facts[name]
    (old / "adapter.json").write_text(json.dumps(facts))
    convert("export", other, tmp_path / "new", "--to", "hf", "--adapter", old)
    with pytest.raises(TargetError, match="is an adapter, not a model"):
        open_target(old)
    (old / "adapter.json").write_text(json.dumps(facts | {"base": str(old)}))
    with pytest.raises(TargetError, match="is itself"):
        open_target(old)
    with pytest.raises(ConversionError, match="no LoRA run"):
        adapters.adapter_of(open_target(other))


def test_rounding_is_no_other_model_and_small_changes_are() -> None:
    """bfloat16 and float16 of a weight pass, eight bits where they are known; a thousandth of its spread does not."""
    weight = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32) * 0.02
    known = fingerprint.sketch({"w": Lazy.of(weight)})
    for dtype in (jnp.bfloat16, np.float16):
        rounded = np.asarray(weight.astype(dtype)).astype(np.float32)
        assert not fingerprint.mismatch(known, {"w": Lazy.of(rounded)})
    blocks = weight.reshape(-1, 32)
    scales = np.abs(blocks).max(1, keepdims=True) / 127
    eight = {"w": Lazy.of((np.rint(blocks / scales) * scales).reshape(weight.shape))}
    assert fingerprint.mismatch(known, eight) and not fingerprint.mismatch(known, eight, coarse=True)
    assert fingerprint.mismatch(known, {"w": Lazy.of(np.roll(weight, 1))}, coarse=True)
    many = {f"w{i}": Lazy.of(np.roll(weight, i)) for i in range(40)}
    moved = {name: Lazy.of(tensor.read() + np.float32(2e-5)) for name, tensor in many.items()}
    assert "sampled values differ" in fingerprint.mismatch(fingerprint.sketch(many), moved)
    assert fingerprint.mismatch(known, {}) == "there is no w"
    assert len(set(fingerprint.places((300, 200)))) == fingerprint.PER_WEIGHT
    assert fingerprint.places((0, 3)) == [] and fingerprint.places((1,)) == [(0,)] * fingerprint.PER_WEIGHT
