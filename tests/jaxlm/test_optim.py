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
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from tolerances import tolerance

from jaxlm.config import ConfigError, MeshConfig, OptimConfig
from jaxlm.guard import init_guard
from jaxlm.model import abstract_model
from jaxlm.optim import (
    GROUPS,
    Treatment,
    as_arrays,
    check_policy,
    clip_scale,
    decays,
    global_norm,
    group_of,
    learning_rate,
    make_optimizer,
    moments,
    opt_state_shardings,
    scalars,
    treatment,
)
from jaxlm.presets import PRESETS
from jaxlm.sharding import make_mesh, sharding
from jaxlm.train import TrainState, make_train_step

CONFIG = OptimConfig(
    lr=3e-4, min_lr=3e-5, warmup_steps=10, decay_steps=110, b1=0.9, b2=0.999, weight_decay=0.1
)
SCHEDULES = ["cosine", "linear", "wsd", "constant"]


def exact(config: OptimConfig, step: int) -> dict[str, mpmath.mpf]:
    """All scalars of a step with 50 digits, from the doubles of the config."""
    lr, low, b1, b2 = (mpmath.mpf(x) for x in (config.lr, config.min_lr, config.b1, config.b2))
    w, end, t = config.warmup_steps, config.decay_steps, step + 1
    if step < w:
        rate = lr * (step + 1) / w
    elif config.schedule == "constant":
        rate = lr
    else:
        start = (1 - mpmath.mpf(config.wsd_decay)) * end if config.schedule == "wsd" else w
        progress = min(mpmath.mpf(1), max(mpmath.mpf(0), mpmath.mpf(step - start) / (end - start)))
        left = (1 + mpmath.cos(mpmath.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
        rate = low + (lr - low) * left
    return {
        "lr": rate,
        "step_size": rate / (1 - b1**t),
        "bias2_root": mpmath.sqrt(1 - b2**t),
        "decay": rate * mpmath.mpf(config.weight_decay),
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("step", [0, 1, 9, 10, 11, 60, 87, 88, 89, 109, 110, 115, 1000])
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


def test_each_schedule_falls_where_it_should() -> None:
    """linear from the warmup's end, wsd over the last fifth, constant never; wsd's decay begins after the warmup."""
    rates = {
        name: [learning_rate(dataclasses.replace(CONFIG, schedule=name), s) for s in (60, 88, 99, 110, 500)]
        for name in SCHEDULES
    }
    assert rates["constant"] == [3e-4] * 5
    assert rates["linear"] == pytest.approx([1.65e-4, 8.94e-5, 5.97e-5, 3e-5, 3e-5], rel=1e-12)
    assert rates["wsd"] == pytest.approx([3e-4, 3e-4, 1.65e-4, 3e-5, 3e-5], rel=1e-12)
    assert rates["wsd"][0] == CONFIG.lr and rates["wsd"][3] == CONFIG.min_lr
    whole = dataclasses.replace(CONFIG, schedule="wsd", wsd_decay=1.0)
    linear = dataclasses.replace(CONFIG, schedule="linear")
    assert [learning_rate(whole, s) for s in range(120)] == [learning_rate(linear, s) for s in range(120)]


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
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, start, optimizer.init(start), zero.astype(jnp.uint32), init_guard(run))
    module = native.build_torch(model, params)
    twin_guard = importlib.import_module("torchref.guard").init_guard(run)
    other = twin.TrainState(0, module, twin_optim.make_optimizer(run.optim, module), 0, twin_guard)
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


def test_bfloat16_moments_round_once_and_only_what_is_kept(x64: None) -> None:
    """m and v are the nearest bfloat16 of the double, where rounding to float32 first would tie; the update is not."""
    config = dataclasses.replace(CONFIG, b2=0.95, moment_dtype="bfloat16", clip_norm=0.0, weight_decay=0.0)
    name, optimizer = "lm_head.weight", make_optimizer(config)
    # (1 - b1) g lies a hair above the middle of two bfloat16: 1 + 2^-8 + 2^-40. Rounded twice it would be one.
    grad = {name: jnp.full(3, (1 + 2**-8 + 2**-40) / (1 - config.b1))}
    zeros = {name: jnp.zeros(3)}
    step = quick_jit(
        lambda g, s: optimizer.update(g, s, zeros, scalars=as_arrays(scalars(config, 0), np.float64))
    )
    change, state = step(grad, optimizer.init(zeros))
    kept = moments(state)
    assert kept.m[name].dtype == kept.v[name].dtype == jnp.bfloat16
    assert np.asarray(kept.m[name], np.float64).tolist() == [1 + 2**-7] * 3
    wide = make_optimizer(dataclasses.replace(config, moment_dtype="same"))
    expected, _ = wide.update(
        grad, wide.init(zeros), zeros, scalars=as_arrays(scalars(config, 0), np.float64)
    )
    assert relative_error(change[name], expected[name]) <= tolerance("f64")


def test_bfloat16_moments_that_could_not_shrink_are_refused() -> None:
    """A decay closer to one than the rounding is one line with both numbers."""
    OptimConfig(moment_dtype="bfloat16", b2=0.995)
    with pytest.raises(ConfigError, match=r"b2=0.999.*must not exceed 0.99609375.*bfloat16"):
        OptimConfig(moment_dtype="bfloat16", b2=0.999)


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
    assert {group_of(path) for path in shapes} <= set(GROUPS)
    for optimizer in ("adamw", "adamw8bit", "muon"):
        config = dataclasses.replace(run.optim, optimizer=optimizer)
        plans = {path: treatment(config, path) for path in shapes}
        muons = {path for path, plan in plans.items() if plan.optimizer == "muon"}
        assert all(len(shapes[path].shape) in (2, 3) for path in muons)
        assert bool(muons) == (optimizer == "muon")
        if importlib.util.find_spec("torch"):
            twin = importlib.import_module("torchref.optim")
            assert {path: tuple(twin.treatment(config, path)) for path in shapes} == plans
            assert {path: twin.group_of(path) for path in shapes} == {p: group_of(p) for p in shapes}


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


ALL = tiny({"shared_d_ff": 12, "shared_gate": True, "expert_bias": True, "pattern": (True, False)},
           qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, qk_norm=True,
           attn_bias_table=True, mlp="gelu_erf")  # fmt: skip


def test_muon_takes_the_hidden_matrices_alone() -> None:
    """Projections of attention and MLPs and the experts; never embedding, head, router, norms, biases or tables."""
    config = dataclasses.replace(CONFIG, optimizer="muon")
    paths = abstract_model(ALL).shapes
    muons = {path for path in paths if treatment(config, path).optimizer == "muon"}
    names = {path.removesuffix(".weight").rpartition(".")[2] for path in muons}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "up", "down"}
    without_adapters = set(GROUPS) - {"adapter"}
    assert {group_of(path) for path in paths if path not in muons} == without_adapters


def test_a_policy_changes_what_it_names_and_nothing_else() -> None:
    """Factors of rate and decay and the optimizer, by whole paths; unnamed keys keep the default."""
    lines = (
        r"blocks\.0\..*_proj\.weight:lr=0.5,optimizer=adamw",
        "embed.weight:decay=2",
        r"lm_head\.weight:optimizer=muon",
    )
    config = dataclasses.replace(CONFIG, optimizer="muon", policy=lines)
    paths = list(abstract_model(ALL).shapes)
    check_policy(config, paths)
    assert treatment(config, "blocks.0.attn.q_proj.weight") == Treatment("adamw", 0.5, 1.0)
    assert treatment(config, "blocks.1.attn.q_proj.weight") == Treatment("muon", 1.0, 1.0)
    assert treatment(config, "embed.weight") == Treatment("adamw", 1.0, 2.0)
    assert treatment(config, "lm_head.weight") == Treatment("muon", 1.0, 1.0)
    assert treatment(config, "final_norm.weight") == Treatment("adamw", 1.0, 0.0)


def test_factors_of_the_policy_reach_the_update(x64: None) -> None:
    """Rate and decay of one parameter scaled; decay=1 makes an embedding shrink, decay=0 spares a matrix."""
    params = {name: jnp.linspace(-1, 1, 6) for name in ("embed.weight", "lm_head.weight")}
    grads = {name: jnp.linspace(1, 2, 6) for name in params}
    plain = update(dataclasses.replace(CONFIG, weight_decay=0.0), params, grads)
    lines = ("embed.weight:lr=0.25,decay=1", "lm_head.weight:decay=0")
    out = update(dataclasses.replace(CONFIG, policy=lines), params, grads)
    assert relative_error(out["lm_head.weight"], plain["lm_head.weight"]) <= tolerance("f64")
    p, rate = params["embed.weight"], 0.25 * learning_rate(CONFIG, 0)
    wanted = p + 0.25 * (plain["embed.weight"] - p) - rate * CONFIG.weight_decay * p
    assert relative_error(out["embed.weight"], wanted) <= tolerance("f64")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ("blocks.*:lr=0.5", "embed:lr=2"),
            r"'embed:lr=2' matches no parameter; the nearest paths are embed.weight, ",
        ),
        (
            (".*_proj.weight:lr=1", "blocks.0.*:decay=0"),
            r"blocks.0.attn.k_proj.weight matches 2 lines, '.*' and '.*'; at",
        ),
        (("embed.weight",), "cannot be read; it must read REGEX:KEY=VALUE"),
        ((":lr=1",), "cannot be read"),
        (("embed.weight:",), "cannot be read"),
        (("embed.weight:lr",), "'lr' is not KEY=VALUE"),
        (("embed.weight:lr=1,,",), "'' is not KEY=VALUE"),
        (("embed.weight:rl=1",), r"unknown key 'rl' \(did you mean 'lr'\?\); keys are lr, decay, optimizer"),
        (("embed.weight:lr=1,lr=2",), "lr stands twice"),
        (("embed.weight:lr=-1",), "lr='-1' must be a finite number that is not negative"),
        (("embed.weight:decay=nan",), "decay='nan' must be"),
        (("embed.weight:lr=fast",), "lr='fast' must be"),
        (
            ("embed.weight:optimizer=adam",),
            r"'adam' must be one of adamw, adamw8bit, muon \(did you mean 'adamw'",
        ),
        (("(embed:lr=1",), r"'\(embed' is no regular expression"),
        (("embed.weight:optimizer=muon",), "embed.weight is no matrix of a projection"),
        ((".*attn_norm.weight:optimizer=muon",), "blocks.0.attn_norm.weight is no matrix"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(lines: tuple[str, ...], message: str) -> None:
    """One line that says what is wrong, from the check and from the optimizer's start alike."""
    config = dataclasses.replace(CONFIG, policy=lines)
    shapes = abstract_model(ALL).shapes
    for check in (
        lambda: check_policy(config, shapes),
        lambda: jax.eval_shape(make_optimizer(config).init, shapes),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            check()
        assert "\n" not in str(caught.value)


WIDE = tiny({"d_ff": 32}, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=256, n_layers=2)
MIXED = ("blocks.0.mlp.*weight:optimizer=adamw8bit", "embed.weight:optimizer=adamw8bit")


@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
def test_optimizer_state_lies_as_its_parameters_do(optimizer: str, x64: None) -> None:
    """On a mesh of all axes: moments, codes and momentum like the weight, one update as on one device."""
    model = dataclasses.replace(
        WIDE, moe=dataclasses.replace(WIDE.moe, pattern=(False, True)), vocab_size=512
    )
    config = dataclasses.replace(CONFIG, optimizer=optimizer, policy=MIXED if optimizer == "muon" else ())
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    abstract, chain = abstract_model(model), make_optimizer(config)
    places = opt_state_shardings(config, abstract.shapes, abstract.axes, mesh)
    params, grads = (random_params(model, seed=s) for s in range(2))
    numbers = as_arrays(scalars(config, 20), np.float64)

    def run(params: dict, grads: dict) -> tuple:
        state = chain.init(params)
        for _ in range(2):
            changes, state = chain.update(grads, state, params, scalars=numbers)
        return changes, state

    lying = {k: sharding(mesh, s.shape, abstract.axes[k]) for k, s in abstract.shapes.items()}
    there = jax.device_put((params, grads), (lying, lying))
    changes, state = quick_jit(run, out_shardings=(lying, places))(*there)
    alone, kept = quick_jit(run)(params, grads)
    assert_close(tree_errors(changes, alone), tolerance("f64_mesh"), "changes")
    # 256 divides the inputs of blocks.0.mlp.down_proj; the codes of the embedding have one row of absmax.
    eight = moments(state).m
    down = "blocks.0.mlp.down_proj.weight"
    assert eight[down].absmax.shape == (1, 32) and eight["embed.weight"].absmax.shape == (64,)
    for path, moment in moments(state).m.items():
        values = getattr(moment, "codes", moment)
        assert values.sharding == lying[path], path
        np.testing.assert_array_equal(
            np.asarray(getattr(moments(kept).m[path], "codes", 0)), np.asarray(getattr(moment, "codes", 0))
        )
    assert eight[down].absmax.sharding == sharding(mesh, (1, 32), abstract.axes[down])
    assert not eight[down].absmax.sharding.is_fully_replicated
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)) > 20
