"""LoRA against the peft library on transformers' own Llama and Mixtral, all in float64: the same factors in peft, in
jaxlm and in torchref, and what becomes of them: logits, gradients, twenty AdamW steps, merged weights, directories.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from helpers import QUICK, Arrays, assert_close, quick_jit, random_params, relative_error, tiny, tree_errors  # noqa: E402
from hf64 import NoNarrowFloats, double_precision  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.finetune.lora as lora  # noqa: E402
import jaxlm.optim as optim  # noqa: E402
import jaxlm.train as train  # noqa: E402
import torchref.finetune.lora as twin_lora  # noqa: E402
import torchref.train as twin_train  # noqa: E402
from convert import peft_adapter, peft_layout  # noqa: E402
from convert.hf.express import fields as config_fields  # noqa: E402
from convert.hf.families import FAMILIES  # noqa: E402
from convert.hf.families import pairs as family_pairs  # noqa: E402
from convert.native import adapter_to_jax, adapter_to_torch, build_adapted, to_jax  # noqa: E402
from convert.rules import Pair  # noqa: E402
from convert.rules import convert as converted  # noqa: E402
from convert.tree import from_jax, from_torch  # noqa: E402
from jaxlm.adapter_config import PROJECTIONS, AdapterConfig, Override, factor_shapes  # noqa: E402
from jaxlm.config import LogConfig, ModelConfig, OptimConfig, TrainConfig  # noqa: E402
from jaxlm.finetune.sft import sft_task  # noqa: E402
from jaxlm.tensor_file import open_file  # noqa: E402
from jaxlm.tune_config import TuneConfig, TuneRun  # noqa: E402
from torchref.finetune.sft import sft_task as twin_sft_task  # noqa: E402

pytestmark = [
    pytest.mark.torch,
    # peft looks for patterns of parameters among the modules only, and applies them all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

GATE, STEPS, B, T, V = tolerance("f64_peft"), 20, 3, 19, 61
ROUTER, HEAD = r"blocks\.\d+\.moe\.router\.weight", r"lm_head\.weight"
PLAIN = AdapterConfig(3, 5.0)
STABILISED = AdapterConfig(
    3,
    5.0,
    rslora=True,
    targets=(*PROJECTIONS, HEAD),
    overrides=(
        Override(r"blocks\.\d+\.(moe\.experts\.gate_up|mlp\.up_proj\.weight)", 5, 2.0),
        Override(r"blocks\.0\.attn\.q_proj\.weight", 2, 1.5),
    ),
)


class Case(NamedTuple):
    """A model of transformers with an adapter on it."""

    family: str
    model: ModelConfig
    adapter: AdapterConfig


ROUTED = dataclasses.replace(STABILISED, targets=(*PROJECTIONS, ROUTER, HEAD))
MIXTURE = tiny({"balance": "mixtral", "balance_coef": 0.05}, init="fan_in", n_layers=1)
CASES = {
    "llama": Case("llama", tiny(init="fan_in", n_layers=1), PLAIN),
    "llama-rslora": Case("llama", tiny(init="fan_in", n_layers=1), STABILISED),
    "mixtral": Case("mixtral", tiny({"balance": "none"}, init="fan_in", n_layers=1), PLAIN),
    "mixtral-rslora-balance": Case("mixtral", MIXTURE, ROUTED),
}


@pytest.fixture(autouse=True)
def float64(x64: None) -> Iterator[None]:
    """jax and transformers compute in float64 for the whole test."""
    names = [f"models.{f}.modeling_{f}" for f in ("llama", "mixtral")]
    names += ["modeling_rope_utils", "masking_utils", "loss.loss_utils"]
    with double_precision(*(importlib.import_module(f"transformers.{name}") for name in names)):
        yield


SLOW = ("llama-rslora", "mixtral")  # the other two have all that these have


@pytest.fixture(params=[pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    """Each model with each adapter."""
    return CASES[request.param]


def table(case: Case) -> list[Pair]:
    """transformers' names of the weights, experts stacked."""
    return family_pairs(case.model, case.family, "fused")


def run_of(case: Case) -> TuneRun:
    """Fine-tuning in float64: a warmup, decay, no clipping."""
    return TuneRun(
        case.model,
        optim=OptimConfig(
            lr=2e-3, min_lr=1e-4, warmup_steps=3, decay_steps=STEPS, clip_norm=0.0, weight_decay=0.1
        ),
        train=TrainConfig(steps=STEPS, batch_size=B, seq_len=T, dtype="float64", param_dtype="float64"),
        log=LogConfig(details=False),
        tune=TuneConfig("sft", "base", adapter=case.adapter),
    )


def factors_of(case: Case, seed: int = 1) -> Arrays:
    """Factors none of which is zero."""
    random, made = np.random.default_rng(seed), {}
    for pair in table(case):
        if case.adapter.adapts(pair.path):
            shapes = factor_shapes(pair.shape, case.adapter.rank_alpha(pair.path)[0])
            for name, shape in zip(("lora_a", "lora_b"), shapes, strict=True):
                made[f"{pair.path}.{name}"] = random.normal(size=shape) / np.sqrt(shape[-2])
    return made


def base_model(case: Case, params: Arrays) -> Any:
    """transformers' model with our weights."""
    said = config_fields(case.model, FAMILIES[case.family])
    said |= {"use_cache": False, "attn_implementation": "eager", "experts_implementation": "eager"}
    said |= {"output_router_logits": case.model.moe.balance == "mixtral"} if case.model.moe.n_experts else {}
    config = transformers.AutoConfig.for_model(case.family, **said)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    tensors = converted(table(case), params)
    model.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, strict=True)
    return model


def in_peft(case: Case, params: Arrays, factors: Arrays, directory: Path) -> Any:
    """peft's model with our factors, read from a directory that we write, ready to be trained."""
    peft_adapter.write_adapter(directory, factors, case.adapter, table(case))
    model = peft.PeftModel.from_pretrained(base_model(case, params), str(directory), is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    return model


def ours(case: Case, held: Callable[[str], np.ndarray]) -> Arrays:
    """peft's factors, or what belongs to them (gradients), in our names and layouts."""
    adapted = [slot for slot in peft_layout.slots(table(case)) if case.adapter.adapts(slot.pair.path)]
    found = {}
    for slot, name in peft_layout.carriers(adapted):
        a, b = slot.inward(*(held(f"{name}.lora_{letter}.default.weight") for letter in "AB"))
        found |= {f"{slot.pair.path}.lora_a": a, f"{slot.pair.path}.lora_b": b}
    return found


def batch() -> tuple[Arrays, Any, Any, Any]:
    """A batch of ours, and ids, attention mask and labels for transformers; padded left and right, with holes."""
    random = np.random.default_rng(2)
    ids, segments = random.integers(0, V, (B, T)), np.ones((B, T), np.int32)
    segments[1, :4], segments[2, 14:] = 0, 0
    carries = (random.random((B, T)) < 0.7) & (segments > 0)
    carries[:, 0] = carries[1, 4] = False  # nothing, or padding, stands before them
    rows = {
        "inputs": ids.astype(np.int32),
        "targets": np.roll(ids, -1, 1).astype(np.int32),
        "loss_mask": np.concatenate([carries[:, 1:], np.zeros((B, 1), bool)], 1).astype(np.float64),
        "segments": segments,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }
    labels = np.where(carries, ids, -100)
    return rows, *(torch.from_numpy(x.astype(np.int64)) for x in (ids, segments, labels))


def tensors_of(rows: Arrays) -> dict[str, Any]:
    """A batch for torchref."""
    return {
        name: torch.from_numpy(x.astype(np.int64) if x.dtype.kind == "i" else x) for name, x in rows.items()
    }


def test_forward_and_gradients_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    """Logits at real positions, the masked loss, and the gradient of every factor, in jaxlm and in torchref."""
    params, factors, run = random_params(case.model), factors_of(case), run_of(case)
    rows, ids, mask, labels = batch()
    model = in_peft(case, params, factors, tmp_path)
    with NoNarrowFloats():
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
    named = dict(model.named_parameters())
    expected = ours(case, lambda name: named[name].grad.numpy())
    assert not [name for name, g in expected.items() if not g.any()]
    real, logits = rows["segments"] > 0, out.logits.detach().numpy()
    plain = base_model(case, params)(input_ids=ids, attention_mask=mask).logits.detach().numpy()
    assert relative_error(plain[real], logits[real]) > 0.1

    frozen, trained = lora.freeze(run, params), {name: jnp.asarray(x) for name, x in factors.items()}
    graphdef, task = lora.adapted(run).graphdef, sft_task(run)

    def both(frozen: Any, trained: Any, rows: Any) -> Any:
        decoder = lora.adapted_decoder(graphdef, frozen, trained)
        return decoder(rows["inputs"], rows["positions"], rows["segments"])[0], train.make_gradient_fn(
            run, task=task
        )(trained, rows, None, None, frozen)

    found, (grads, metrics) = quick_jit(both)(frozen, trained, rows)
    errors = {"logits": relative_error(np.asarray(found)[real], logits[real])}
    errors |= {"loss": relative_error(metrics["total_loss"], out.loss.detach())}
    assert_close(errors | tree_errors(from_jax(grads), expected), GATE)

    decoder, given = build_adapted(case.model, params, factors, case.adapter), tensors_of(rows)
    with NoNarrowFloats():
        found = decoder(given["inputs"], given["positions"], given["segments"])[0].detach().numpy()
        gradients = twin_train.make_gradient_fn(run, twin_sft_task(run))
        theirs, metrics = gradients(decoder, given, None)
    back = adapter_to_jax({name: g.numpy() for name, g in theirs.items()})
    errors = {"logits": relative_error(found[real], logits[real])}
    errors |= {"loss": relative_error(metrics["total_loss"].detach(), out.loss.detach())}
    assert_close(errors | tree_errors(back, expected), GATE)


def test_twenty_steps_of_adamw_and_the_merged_weights_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    """torch.optim.AdamW on peft's parameters; both of ours, with their own optimizers, end where it ends."""
    params, factors, run = random_params(case.model), factors_of(case), run_of(case)
    rows, ids, mask, labels = batch()
    settings = run.optim
    model = in_peft(case, params, factors, tmp_path)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(
        named.values(),
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    for step in range(STEPS):
        adamw.param_groups[0]["lr"] = float(optim.scalars(settings, step).lr)
        adamw.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        adamw.step()
    expected = ours(case, lambda name: named[name].detach().numpy())
    moved = {name: relative_error(expected[name], factors[name]) for name in factors}
    assert min(moved.values()) > 1e-3

    task, frozen = sft_task(run), lora.freeze(run, params)
    state = train.init_state(run, None, task, {name: jnp.array(x) for name, x in factors.items()})
    scalars = [optim.as_arrays(optim.scalars(settings, step), np.dtype(np.float64)) for step in range(STEPS)]
    step_of = train.make_train_step(run, None, task=task).lower(state, rows, scalars[0], frozen)
    advance = step_of.compile(compiler_options=QUICK)
    for values in scalars:
        state, _ = advance(state, rows, values, frozen)
    trained = from_jax(state.params)
    assert_close(tree_errors(trained, expected), GATE, "factors of jaxlm")
    assert all(np.array_equal(frozen[path], x) for path, x in params.items())

    decoder = build_adapted(case.model, params, factors, case.adapter)
    twin = twin_steps(run, decoder, rows)
    assert_close(tree_errors(twin, expected), GATE, "factors of torchref")

    state_dict = model.merge_and_unload().state_dict()
    theirs = converted(table(case), {name: x.numpy() for name, x in state_dict.items()}, inverse=True)
    by_jax = from_jax(lora.merge({k: jnp.asarray(x) for k, x in params.items()}, state.params, case.adapter))
    assert_close(tree_errors(by_jax, theirs), GATE, "merged weights of jaxlm")
    merged = peft_adapter.merge(params, trained, case.adapter)
    assert_close(tree_errors(merged, theirs), GATE, "merged weights of convert")
    by_torch = twin_lora.merge(*torch_side(case, params, twin), case.adapter)
    back = to_jax(case.model, {name: x.detach().numpy() for name, x in by_torch.items()})
    assert_close(tree_errors(back, theirs), GATE, "merged weights of torchref")
    assert {path for path in params if not np.array_equal(theirs[path], params[path])} == {
        path for path in params if case.adapter.adapts(path)
    }


def torch_side(case: Case, params: Arrays, factors: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and factors as torchref has them."""
    from convert.native import to_torch
    from convert.tree import to_tensor

    weights = {name: to_tensor(x) for name, x in to_torch(case.model, params).items()}
    return weights, {name: to_tensor(x) for name, x in adapter_to_torch(factors).items()}


def twin_steps(run: TuneRun, decoder: Any, rows: Arrays) -> Arrays:
    """The factors after as many steps of torchref's."""
    import torchref.optim as twin_optim

    given = tensors_of(rows)
    state = twin_train.init_state(run)._replace(model=decoder)
    state = state._replace(optimizer=twin_optim.make_optimizer(run.optim, decoder))
    advance = twin_train.make_train_step(run, twin_sft_task(run))
    for step in range(STEPS):
        state, _ = advance(state, given, twin_optim.scalars(run.optim, step))
    held = from_torch(state.model)
    return adapter_to_jax({name: x for name, x in held.items() if ".lora_" in name})


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_an_adapter_of_ours_comes_back_from_peft_to_the_bit(case: Case, dtype: Any, tmp_path: Path) -> None:
    """ours -> peft opens and saves it -> ours, and peft's file -> ours -> peft's file."""
    factors = {name: x.astype(dtype) for name, x in factors_of(case).items()}
    there, saved, again = (tmp_path / name for name in ("there", "saved", "again"))
    there.mkdir()
    again.mkdir()
    peft_adapter.write_adapter(there, factors, case.adapter, table(case))
    base = base_model(case, random_params(case.model))
    base = base if dtype is np.float64 else base.to(torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(there))
    model.save_pretrained(str(saved), save_embedding_layers=False)
    config, back = peft_adapter.read_adapter(saved, table(case))
    assert list(back) == list(factors)
    for name, x in factors.items():
        assert back[name].dtype == x.dtype and back[name].tobytes() == x.tobytes()
        path = name.rpartition(".")[0]
        assert config.rank_alpha(path) == case.adapter.rank_alpha(path)
        assert config.scale(path) == case.adapter.scale(path)
    peft_adapter.write_adapter(again, back, config, table(case))
    first, second = (open_file(folder / peft_adapter.TENSORS) for folder in (saved, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert np.asarray(tensor.read()).tobytes() == np.asarray(second[name].read()).tobytes()
