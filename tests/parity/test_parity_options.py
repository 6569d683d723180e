"""jaxlm equals torchref in float64 for every architecture option: activations, losses, gradients, AdamW steps."""

import dataclasses
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import (  # noqa: E402
    QUICK,
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance  # noqa: E402

import jaxlm.moe  # noqa: E402
import jaxlm.optim  # noqa: E402
import jaxlm.train  # noqa: E402
import torchref.guard  # noqa: E402
import torchref.layers  # noqa: E402
import torchref.moe  # noqa: E402
import torchref.optim  # noqa: E402
import torchref.train  # noqa: E402
from convert import native  # noqa: E402
from convert.tree import from_torch, to_numpy  # noqa: E402
from jaxlm.config import ModelConfig, MoEConfig, RopeScaling  # noqa: E402
from jaxlm.guard import init_guard  # noqa: E402
from jaxlm.layers import Backends  # noqa: E402
from jaxlm.model import abstract_model, merge_model  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("x64")]

YARN = RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25)
EVERYTHING = tiny(
    {
        "pattern": (False, True),
        "renormalize": False,
        "capacity_factor": 1.0,
        "balance": "maxtext",
        "router_z_coef": 1e-2,
        "expert_bias": True,
        "shared_d_ff": 12,
        "shared_gate": True,
    },
    rope_scaling=dataclasses.replace(YARN, attention_factor=1.2),
    qkv_bias=True,
    attn_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    attn_bias_table=True,
    qk_norm=True,
    tied=True,
    windows=(0, 5),
)
CASES: dict[str, ModelConfig] = {
    "dense": tiny(),
    "mha-biases": tiny(n_kv_heads=6, qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True),
    "mqa-qk_norm-tied": tiny(n_kv_heads=1, qk_norm=True, tied=True, head_bias=True),
    "learned-gelu_tanh": tiny(position="learned", mlp="gelu_tanh", qkv_bias=True, mlp_bias=True),
    "gelu_erf-bias_table": tiny(mlp="gelu_erf", attn_bias_table=True, windows=(7,)),
    "linear-windows": tiny(rope_scaling=RopeScaling("linear", 2.5), windows=(3, 0), tied=True),
    "llama3": tiny(rope_scaling=RopeScaling("llama3", 8.0, 16, low_freq_factor=1.5, high_freq_factor=6.0)),
    "yarn": tiny(rope_scaling=YARN),
    "moe-mixtral": tiny({}),
    "moe-layer_mean-pattern": tiny({"balance": "layer_mean", "pattern": (True, False)}, qkv_bias=True),
    "moe-layer_sum-capacity": tiny(
        {"balance": "layer_sum", "capacity_factor": 1.0, "expert_bias": True, "n_experts": 3},
        mlp="gelu_erf",
        attn_out_bias=True,
        head_bias=True,
        attn_bias_table=True,
    ),
    "moe-megatron-z": tiny(
        {"balance": "megatron", "renormalize": False, "router_z_coef": 1e-2, "n_experts": 3}
    ),
    "moe-levanter-top1-shared": tiny(
        {"balance": "levanter", "n_active": 1, "shared_d_ff": 12, "pattern": (False, True)}, mlp_bias=True
    ),
    "moe-none-shared_gate": tiny(
        {
            "balance": "none",
            "n_active": 4,
            "shared_d_ff": 12,
            "shared_gate": True,
            "d_ff": 0,
            "pattern": (True, False),
        }
    ),
    "everything": EVERYTHING,
}
# The backend with the longest compilation is compared in the first MoE case; tests of the experts compare it to `loop`.
COMPILED_EXPERTS = "moe-mixtral"


def zero_gradient(config: ModelConfig, path: str) -> bool:
    """Without rotation and norm, a key bias adds the same score to all keys of a query: softmax does not see it."""
    return path.endswith("k_proj.bias") and config.position == "learned" and not config.qk_norm


def backends(name: str) -> Backends:
    return Backends() if name == COMPILED_EXPERTS else Backends(experts="loop")


def finite(activation: Any) -> np.ndarray:
    """Scores of keys that may not be seen are -inf; here a number that no score comes near."""
    activation = np.asarray(activation)
    return np.where(np.isneginf(activation), -1e6, activation)


def torch_side(run: Any, params: Any, batch: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """torchref's activations, metrics and gradients (in jaxlm's names), as numpy."""
    model, rows = native.build_torch(run.model, params), torchref.train.place_batch(batch)
    shown = native.build_torch(run.model, params, torchref.layers.Backends(attention="explicit"))
    with torch.no_grad():
        _, acts, _ = shown(rows["inputs"], rows["positions"], rows["segments"], train=True)
    grads, metrics = torchref.train.make_gradient_fn(run)(model, rows)
    grads = native.to_jax(run.model, {path: to_numpy(g) for path, g in grads.items()})
    return {k: finite(a) for k, a in acts.items()}, {k: m.numpy() for k, m in metrics.items()}, grads


@pytest.mark.parametrize("name", CASES)
def test_activations_losses_and_gradients_agree(name: str) -> None:
    """Every activation by key, every loss term, every gradient; small and fan-in-sized weights; ragged packed rows."""
    config, batch = CASES[name], hard_batch()
    run, graphdef = tiny_run(config), abstract_model(config, backends(name)).graphdef
    gradients = jaxlm.train.make_gradient_fn(run, backends(name))

    @quick_jit
    def jax_side(params, batch):
        model = merge_model(graphdef, params)
        _, acts, _ = model(batch["inputs"], batch["positions"], batch["segments"], train=True)
        return acts, *gradients(params, batch)

    for init in ("normal", "fan_in"):
        params = random_params(config, init=init)
        acts, grads, metrics = jax_side(params, batch)
        torch_acts, torch_metrics, torch_grads = torch_side(run, params, batch)
        assert set(acts) == set(torch_acts) and set(metrics) == set(torch_metrics)
        limit = tolerance("f64")
        assert_close(
            {k: relative_error(finite(acts[k]), torch_acts[k]) for k in acts}, limit, f"{init} activations"
        )
        assert_close(
            {k: relative_error(metrics[k], torch_metrics[k]) for k in metrics}, limit, f"{init} metrics"
        )
        errors = tree_errors(grads, torch_grads, lambda path: zero_gradient(config, path))
        assert_close(errors, limit, f"{init} gradients")
        if config.moe.n_experts and config.moe.capacity_factor:
            assert 0 < metrics["dropped"] < 1, "the capacity limit was not exercised"


@pytest.mark.parametrize("name", ["dense", "everything"])
def test_five_adamw_steps_agree(name: str) -> None:
    """Parameters, m, v and the change of the parameters, with two micro-batches and an active clip."""
    config, steps = CASES[name], 5
    run = tiny_run(config, accumulation=2)
    params = random_params(config, init="normal")
    optimizer = jaxlm.optim.make_optimizer(run.optim)
    start = {k: jnp.asarray(p) for k, p in params.items()}
    state = jaxlm.train.TrainState(
        jnp.zeros((), jnp.int32), start, optimizer.init(start), jnp.zeros((), jnp.uint32), init_guard(run)
    )
    model = native.build_torch(config, params)
    torch_optimizer = torchref.optim.make_optimizer(run.optim, model)
    torch_state = torchref.train.TrainState(0, model, torch_optimizer, 0, torchref.guard.init_guard(run))
    torch_step = torchref.train.make_train_step(run)
    batches = [hard_batch(seed=s) for s in range(steps)]
    numbers = [jaxlm.optim.as_arrays(jaxlm.optim.scalars(run.optim, s), np.float64) for s in range(steps)]
    step = (
        jaxlm.train.make_train_step(run, backends=backends(name))
        .lower(state, batches[0], numbers[0])
        .compile(QUICK)
    )
    for s in range(steps):
        state, metrics = step(state, jaxlm.train.place_batch(batches[s]), numbers[s])
        torch_state, torch_metrics = torch_step(
            torch_state, torchref.train.place_batch(batches[s]), torchref.optim.scalars(run.optim, s)
        )
        errors = {k: relative_error(metrics[k], torch_metrics[k].numpy()) for k in metrics if k != "lr"}
        assert_close(errors, tolerance("f64"), f"metrics of step {s}")
        assert metrics["clip_scale"] < 1, "the clip was not exercised"

    torch_moments = torchref.optim.moments(model, torch_state.optimizer)
    back = {
        slot: native.to_jax(config, {k: to_numpy(v) for k, v in values.items()})
        for slot, values in torch_moments._asdict().items()
    }
    ours, theirs = jaxlm.optim.moments(state.opt_state), native.to_jax(config, from_torch(model))
    assert_close(tree_errors(state.params, theirs), tolerance("f64_state"), "parameters")
    assert_close(tree_errors(ours.m, back["m"]), tolerance("f64_state"), "first moments")
    assert_close(tree_errors(ours.v, back["v"]), tolerance("f64_state"), "second moments")
    moved, torch_moved = ({k: np.asarray(p[k]) - params[k] for k in params} for p in (state.params, theirs))
    assert_close(tree_errors(moved, torch_moved), tolerance("f64_delta"), "changes")


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_router_ties_go_to_the_lowest_index(experts: int) -> None:
    """Logits of three values only: nearly every row ties, and both frameworks pick as a stable sort does."""
    logits = np.random.default_rng(experts).integers(0, 3, (200, experts)).astype(np.float64)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :3]
    ids, weights = jaxlm.moe.route(jnp.asarray(logits), 3, True)
    torch_ids, torch_weights = torchref.moe.route(torch.from_numpy(logits), 3, True)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(torch_ids, expected)
    assert relative_error(weights, torch_weights.numpy()) <= tolerance("f64")


SIZES = {
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "head_dim",
    "d_ff",
    "context",
    "rope_theta",
    "norm_eps",
}
SAME = {
    "init": "both values, by the widths of the weights",
    "init_std": "a width of the weights",
    "dropout": "random streams differ between frameworks; tests of dropout look at its statistics",
    "balance_coef": "a factor; balance='none' is its zero",
}


@pytest.mark.parametrize("config_class", [ModelConfig, MoEConfig, RopeScaling])
def test_every_option_is_compared(config_class: type) -> None:
    """Each option of the config takes two values among the cases, and each named choice occurs."""
    parts = {ModelConfig: lambda c: c, MoEConfig: lambda c: c.moe, RopeScaling: lambda c: c.rope_scaling}
    used = [parts[config_class](config) for config in CASES.values()]
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name in SIZES | SAME.keys() or dataclasses.is_dataclass(hints[field.name]):
            continue
        values = {getattr(part, field.name) for part in used}
        wanted = (
            set(typing.get_args(hints[field.name]))
            if typing.get_origin(hints[field.name]) is typing.Literal
            else set()
        )
        assert wanted <= values, f"{config_class.__name__}.{field.name}: {wanted - values} never compared"
        assert len(values) > 1, f"{config_class.__name__}.{field.name} has one value only, {values}"
