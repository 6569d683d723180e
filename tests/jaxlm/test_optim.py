"""AdamW, its schedule and its weight decay: exact scalars, torch's trajectory, every parameter under one rule."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from helpers import (
    QUICK,
    assert_close,
    hard_batch,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance

from jaxlm.config import OptimConfig
from jaxlm.model import abstract_model
from jaxlm.optim import (
    as_arrays,
    clip_scale,
    decays,
    global_norm,
    learning_rate,
    make_optimizer,
    moments,
    scalars,
)
from jaxlm.presets import PRESETS
from jaxlm.train import TrainState, make_train_step

CONFIG = OptimConfig(
    lr=3e-4, min_lr=3e-5, warmup_steps=10, decay_steps=110, b1=0.9, b2=0.999, weight_decay=0.1
)


def exact(config: OptimConfig, step: int) -> dict[str, mpmath.mpf]:
    """All scalars of a step with 50 digits, from the doubles of the config."""
    lr, low, b1, b2 = (mpmath.mpf(x) for x in (config.lr, config.min_lr, config.b1, config.b2))
    w, end, t = config.warmup_steps, config.decay_steps, step + 1
    if step < w:
        rate = lr * (step + 1) / w
    elif config.schedule == "constant":
        rate = lr
    else:
        progress = min(mpmath.mpf(1), mpmath.mpf(step - w) / (end - w))
        rate = low + (lr - low) * (1 + mpmath.cos(mpmath.pi * progress)) / 2
    return {
        "lr": rate,
        "step_size": rate / (1 - b1**t),
        "bias2_root": mpmath.sqrt(1 - b2**t),
        "decay": rate * mpmath.mpf(config.weight_decay),
    }


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 60, 109, 110, 115, 1000])
def test_scalars_are_exact_doubles(step: int, schedule: str) -> None:
    """Learning rate, bias corrections and decay against 50 digits; 1 - b2^t at t = 1 loses only what doubles must."""
    config = dataclasses.replace(CONFIG, schedule=schedule)
    with mpmath.workdps(50):
        for name, value in exact(config, step).items():
            got = getattr(scalars(config, step), name)
            # 1 - b^t cancels leading digits for small t: the rounding of b^t is magnified by b^t / (1 - b^t).
            magnified = {
                "bias2_root": 1 / (1 - config.b2 ** (step + 1)),
                "step_size": 1 / (1 - config.b1 ** (step + 1)),
            }
            limit = tolerance("f64_scalar") * magnified.get(name, 1.0)
            assert abs(got - value) <= limit * abs(value), (
                f"{name}: {got} instead of {mpmath.nstr(value, 20)}"
            )


def test_the_schedule_hits_its_corners() -> None:
    """Steps 0, 1, w-1, w, the middle, T and after: warmup starts above zero, peak at w-1 and w, floor from T on."""
    rate = [learning_rate(CONFIG, s) for s in (0, 1, 9, 10, 60, 110, 115)]
    assert rate == pytest.approx([3e-5, 6e-5, 3e-4, 3e-4, 1.65e-4, 3e-5, 3e-5], rel=1e-12)
    assert rate[2] == CONFIG.lr and rate[5] == rate[6] == CONFIG.min_lr
    assert learning_rate(CONFIG, 109) > CONFIG.min_lr
    after = [learning_rate(CONFIG, s) for s in range(10, 111)]
    assert all(a > b for a, b in zip(after, after[1:])), "the decay is not monotonic"
    assert learning_rate(dataclasses.replace(CONFIG, warmup_steps=0, decay_steps=100), 0) == CONFIG.lr


def test_fifty_steps_equal_torch_adamw(x64: None) -> None:
    """A real model, 50 float64 steps, some clipped: losses, parameters, m and v against torch.optim.AdamW."""
    torch = pytest.importorskip("torch")
    native, tree, twin = (
        importlib.import_module(n) for n in ("convert.native", "convert.tree", "torchref.train")
    )
    twin_optim = importlib.import_module("torchref.optim")
    model, steps = tiny(n_layers=1, qkv_bias=True), 50
    run = tiny_run(model, {"decay_steps": 45, "warmup_steps": 5, "clip_norm": 1.04, "b2": 0.999}, steps=steps)
    params, optimizer = random_params(model), make_optimizer(run.optim)
    start = {k: jnp.asarray(p) for k, p in params.items()}
    state = TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), jnp.zeros((), jnp.uint32))
    module = native.build_torch(model, params)
    other = twin.TrainState(0, module, twin_optim.make_optimizer(run.optim, module), 0)
    batches = [hard_batch(seed=s) for s in range(3)]
    first = as_arrays(scalars(run.optim, 0), np.float64)
    step = make_train_step(run).lower(state, batches[0], first).compile(QUICK)
    torch_step, scales = twin.make_train_step(run), []
    for s in range(steps):
        state, metrics = step(
            state, jax.device_put(batches[s % 3]), as_arrays(scalars(run.optim, s), np.float64)
        )
        other, theirs = torch_step(other, twin.place_batch(batches[s % 3]), twin_optim.scalars(run.optim, s))
        assert relative_error(metrics["loss"], theirs["loss"].numpy()) <= tolerance("f64"), f"step {s}"
        scales.append(float(metrics["clip_scale"]))
    assert min(scales) < 1, "the clip was never active"
    assert max(scales) == 1, "the clip was always active"
    assert int(state.step) == steps
    limit = tolerance("f64_state")
    assert_close(
        tree_errors(state.params, native.to_jax(model, tree.from_torch(module))), limit, "parameters"
    )
    ours, kept = moments(state.opt_state), twin_optim.moments(module, other.optimizer)
    for name in ("m", "v"):
        back = native.to_jax(model, {k: tree.to_numpy(v) for k, v in getattr(kept, name).items()})
        assert_close(tree_errors(getattr(ours, name), back), limit, name)
    assert torch.get_default_dtype() == torch.float32


def update(config: OptimConfig, params: dict, grads: dict, step: int = 0) -> dict:
    """One update of fresh moments, as new parameters."""
    optimizer = make_optimizer(config)
    arrays = as_arrays(scalars(config, step), np.float64)
    changes, _ = optimizer.update(grads, optimizer.init(params), params, scalars=arrays)
    return {k: params[k] + changes[k] for k in params}


def test_weight_decay_works_without_a_gradient(x64: None) -> None:
    """Zero gradients leave p (1 - lr wd) for matrices and p itself for norms, biases and (by default) embeddings."""
    names = (
        "blocks.0.attn.q_proj.weight",
        "blocks.0.attn.q_proj.bias",
        "blocks.0.attn_norm.weight",
        "embed.weight",
    )
    params = {name: jnp.linspace(-1, 1, 6) for name in names}
    zeros = {name: jnp.zeros(6) for name in names}
    factor = 1 - learning_rate(CONFIG, 0) * CONFIG.weight_decay
    for decay in ("matrices", "matrices_and_embeddings"):
        out = update(dataclasses.replace(CONFIG, decay=decay), params, zeros)
        for name in names:
            wanted = factor if name == names[0] or (name == names[3] and decay != "matrices") else 1.0
            assert relative_error(out[name], params[name] * wanted) <= tolerance("f64")


def test_eps_stands_outside_the_root_after_bias_correction(x64: None) -> None:
    """With gradients as small as eps, the first step is lr g/(|g| + eps): half of lr at |g| = eps."""
    config = dataclasses.replace(CONFIG, eps=1e-8, weight_decay=0.0, clip_norm=0.0)
    name = "lm_head.weight"
    out = update(config, {name: jnp.zeros(1)}, {name: jnp.full(1, 1e-8)})
    assert relative_error(out[name], np.full(1, -learning_rate(config, 0) / 2)) <= tolerance("f64")


def test_the_clip_is_torchs_formula(x64: None) -> None:
    """g min(1, c / (norm + 1e-6)); a limit of zero clips nothing."""
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    assert float(global_norm(grads)) == 5.0
    assert float(clip_scale(jnp.float64(5.0), 1.0)) == pytest.approx(1 / (5 + 1e-6), rel=1e-15)
    assert float(clip_scale(jnp.float64(0.5), 1.0)) == 1.0
    assert float(clip_scale(jnp.float64(1e9), 0.0)) == 1.0
    assert math.isnan(float(clip_scale(jnp.float64(math.nan), 1.0))), "a NaN gradient must not be hidden"


@pytest.mark.parametrize("name", PRESETS)
def test_the_decay_policy_names_every_parameter_once(name: str) -> None:
    """`decays` raises unless exactly one line matches; both frameworks have the same policy."""
    run = PRESETS[name].config
    model = dataclasses.replace(run.model, n_layers=min(run.model.n_layers, 2 * len(run.model.moe.pattern)))
    shapes = abstract_model(model).shapes
    decayed = {path for path in shapes if decays(run.optim, path)}
    assert decayed and decayed < set(shapes)
    assert not [path for path in decayed if len(shapes[path].shape) == 1], "a norm or a bias decays"
    if importlib.util.find_spec("torch"):
        twin = importlib.import_module("torchref.optim")
        assert {path for path in shapes if twin.decays(run.optim, path)} == decayed


def test_the_decay_policy_covers_every_option() -> None:
    """Parameters that no preset has are named too, and an unknown one is refused."""
    model = tiny({"shared_d_ff": 12, "shared_gate": True, "expert_bias": True, "pattern": (True, False)},
                 qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, qk_norm=True,
                 attn_bias_table=True, tied=True, position="learned", mlp="gelu_erf")  # fmt: skip
    shapes = abstract_model(model).shapes
    for decay in ("matrices", "matrices_and_embeddings"):
        config = dataclasses.replace(CONFIG, decay=decay)
        undecayed = {path for path in shapes if not decays(config, path)}
        small = {path for path in shapes if "bias" in path.rsplit(".", 1)[-1] or path.endswith("norm.weight")}
        tables = {"embed.weight", "pos_embed.weight"} | {
            path for path in shapes if path.endswith("bias_table")
        }
        assert undecayed == (
            (small | tables) if decay == "matrices" else (small - {p for p in small if "table" in p})
        )
    with pytest.raises(ValueError, match="matches 0 lines"):
        decays(CONFIG, "blocks.0.mystery")
