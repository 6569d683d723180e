"""Adapters on a frozen base: what they compute, what they cost, and what they leave alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    hard_batch,
    quick_jit,
    random_params,
    relative_error,
    tiny,
    tiny_run,
    tree_errors,
)
from jax._src.ad_checkpoint import saved_residuals
from tolerances import tolerance

from jaxlm.adapter_config import PROJECTIONS, AdapterConfig, Override, check_targets
from jaxlm.config import ConfigError, InputError, MeshConfig, ModelConfig
from jaxlm.finetune.lora import (
    Adapters,
    adapted,
    adapted_decoder,
    freeze,
    generation_model,
    init_factors,
    merge,
    unmerge,
)
from jaxlm.finetune.sft import sft_task
from jaxlm.generate import decode
from jaxlm.layers import split_key
from jaxlm.model import Split, abstract_model, merge_model
from jaxlm.optim import as_arrays, scalars
from jaxlm.quant import Quantized, dequantize_tensor, is_quantized
from jaxlm.sampling import Sampling
from jaxlm.sharding import make_mesh
from jaxlm.train import (
    frozen_shardings,
    init_state,
    make_gradient_fn,
    make_train_step,
    place_batch,
    pretraining,
)
from jaxlm.tune_config import TuneConfig, TuneRun

DENSE = tiny(n_layers=1, qkv_bias=True)
MIXED = tiny({"shared_d_ff": 12, "shared_gate": True}, n_layers=1)
EVERYTHING = (*PROJECTIONS, r".*\.router\.weight", r".*\.shared_gate\.weight", r"lm_head\.weight")
ADAPTER = AdapterConfig(3, 5.0, targets=EVERYTHING, overrides=(Override(r".*\.o_proj\.weight", 2, 7.0),))


def tuned(
    model: ModelConfig, adapter: AdapterConfig | None, quant: Any = "none", mesh: Any = None, **train: Any
) -> TuneRun:
    """A tiny run of supervised fine-tuning."""
    run = tiny_run(model, mesh=mesh, **train)
    return TuneRun.of(run, TuneConfig("sft", "base", adapter=adapter, quant=quant))


def random_factors(run: TuneRun, seed: int = 1) -> dict[str, Any]:
    """Factors of which neither is zero."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype) for k, s in adapted(run).shapes.items()}


def gradients(run: TuneRun, factors: Any, frozen: Any) -> Any:
    """Gradients and metrics of one hard batch, without dropout."""
    compute = make_gradient_fn(run, task=sft_task(run))
    return quick_jit(compute)(factors, hard_batch(), None, None, frozen)


def wide_weights(run: TuneRun, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that a frozen base stands for, quantised ones as their codes say."""
    shapes = abstract_model(run.model).shapes
    found = {path: value for path, value in frozen.items() if path in shapes}
    for path in filter(is_quantized, shapes):
        if path not in found:
            stored = Quantized(*(frozen.get(f"{path}.{name}") for name in Quantized._fields))
            *lead, n_in, n_out = shapes[path].shape
            found[path] = dequantize_tensor(stored, run.tune.quant, (*lead, n_out, n_in)).mT
    return {path: value.astype(run.train.dtype) for path, value in found.items()}


def test_a_fresh_adapter_changes_no_bit() -> None:
    """b is zero: logits are the base's own, bit for bit, of experts, router and head too."""
    run = tuned(MIXED, ADAPTER, dtype="float32", param_dtype="float32")
    frozen = freeze(run, random_params(MIXED))
    factors, ids = quick_jit(lambda: init_factors(run))(), jnp.asarray(hard_batch()["inputs"])
    ours = quick_jit(lambda f, a: adapted_decoder(adapted(run).graphdef, f, a)(ids)[0])(frozen, factors)
    base = quick_jit(lambda f: merge_model(abstract_model(MIXED).graphdef, f)(ids)[0])(frozen)
    np.testing.assert_array_equal(ours, base)


def test_fresh_factors_are_pefts() -> None:
    """a is uniform within 1/sqrt(in), b zero; each expert has its own, and the seed alone decides."""
    run = tuned(tiny({}, d_model=256), AdapterConfig(8, 16.0), dtype="float32", param_dtype="float32")
    factors = quick_jit(lambda: init_factors(run))()
    assert factors.keys() == adapted(run).shapes.keys()
    for path, value in factors.items():
        if path.endswith("lora_b"):
            assert not value.any(), path
            continue
        bound = value.shape[-2] ** -0.5
        assert np.abs(value).max() <= bound
        if value.size > 1000:
            assert 0.93 < float(value.std()) / (bound / 3**0.5) < 1.07, path
    values = [np.asarray(v).ravel()[:40] for k, v in factors.items() if k.endswith("lora_a")]
    assert len({v.tobytes() for v in values}) == len(values)
    experts = factors["blocks.0.moe.experts.gate_up.lora_a"]
    assert len({np.asarray(one).tobytes() for one in experts}) == len(experts)
    seeded = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=1))
    other = quick_jit(lambda: init_factors(seeded))()
    assert not np.array_equal(other["blocks.0.moe.experts.gate_up.lora_a"], experts)


@pytest.mark.parametrize("rslora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_adapted_is_merged(rslora: bool, x64: None) -> None:
    """The adapted decoder is the decoder of the merged weights, in loss and in logits; unmerged they are the base's."""
    adapter = dataclasses.replace(ADAPTER, rslora=rslora)
    run = tuned(MIXED, adapter)
    frozen, factors = freeze(run, random_params(MIXED)), random_factors(run)
    ids = jnp.asarray(hard_batch()["inputs"])
    merged = jax.jit(lambda p, f: merge(p, f, adapter))(frozen, factors)
    ours = quick_jit(lambda f, a: adapted_decoder(adapted(run).graphdef, f, a)(ids)[0])(frozen, factors)
    theirs = quick_jit(lambda p: merge_model(abstract_model(MIXED).graphdef, p)(ids)[0])(merged)
    assert relative_error(ours, theirs) <= tolerance("f64_peft")
    changed = {path for path in merged if not np.array_equal(merged[path], frozen[path])}
    assert changed == {path.rpartition(".")[0] for path in factors}
    path = "blocks.0.attn.o_proj.weight"  # the formula once, by numpy, with the override's rank and alpha
    delta = np.asarray(factors[f"{path}.lora_a"]) @ np.asarray(factors[f"{path}.lora_b"])
    expected = np.asarray(frozen[path]) + 7.0 / (2**0.5 if rslora else 2) * delta
    assert relative_error(merged[path], expected) <= tolerance("f64")
    assert_close(tree_errors(unmerge(merged, factors, adapter), frozen), tolerance("f64"))


def test_merging_into_another_base_is_refused() -> None:
    """A factor whose weight is not there is named."""
    run = tuned(DENSE, AdapterConfig(2, 2.0), dtype="float32", param_dtype="float32")
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.k_proj\.weight is no weight of this base"):
        merge({}, random_factors(run), run.tune.adapter)


@pytest.mark.parametrize("quant", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_training_leaves_the_base_alone(quant: str) -> None:
    """Steps change every factor and no bit of the base, codes included; the state holds factors alone."""
    run = tuned(DENSE, AdapterConfig(2, 4.0), quant, dtype="bfloat16", param_dtype="float32")
    task = sft_task(run)
    frozen = freeze(run, random_params(DENSE))
    assert {k: (v.shape, v.dtype) for k, v in frozen.items()} == {
        k: (v.shape, v.dtype) for k, v in task.frozen_shapes.items()
    }
    wide = {path for path, value in frozen.items() if value.dtype == jnp.float32}
    assert {path for path in wide if not path.endswith(Quantized._fields)} == {
        path for path in frozen if path.endswith("norm.weight")
    }
    before = jax.tree.map(np.asarray, frozen)
    state = init_state(run, task=task)
    first = jax.tree.map(np.asarray, state.params)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(moments) == sorted([s.shape for s in task.shapes.values()] * 2)
    step = make_train_step(run, task=task)
    for i in range(2):
        values = as_arrays(scalars(run.optim, i), np.dtype("float32"))
        state, metrics = step(state, place_batch(hard_batch()), values, frozen)
    assert np.isfinite(metrics["loss"])
    assert {p.dtype for p in state.params.values()} == {jnp.dtype("float32")}
    assert not [path for path, value in state.params.items() if np.array_equal(value, first[path])]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))


def test_dropout_is_of_adapters_while_training(x64: None) -> None:
    """The same key drops the same, another another, none nothing; over many keys the mean is the adapter itself."""
    run = tuned(DENSE, AdapterConfig(3, 5.0, dropout=0.4, targets=(r".*\.q_proj\.weight",)))
    frozen, factors = freeze(run, random_params(DENSE)), random_factors(run)
    graphdef, x = adapted(run).graphdef, jnp.asarray(np.random.default_rng(0).normal(size=(2, 24)))

    def project(key: Any) -> Any:
        return adapted_decoder(graphdef, frozen, factors, key).blocks[0].attn.q_proj(x)

    seeds = jnp.arange(2000)
    many = quick_jit(lambda: jax.vmap(lambda seed: project(jax.random.key(seed)))(seeds))()
    whole, again = project(None), project(jax.random.key(0))
    assert run.tune.adapter is not None
    merged = merge(frozen, factors, run.tune.adapter)
    exact = x @ merged["blocks.0.attn.q_proj.weight"] + merged["blocks.0.attn.q_proj.bias"]
    assert relative_error(whole, exact) <= tolerance("f64")
    assert relative_error(many[0], again) <= tolerance("f64")
    assert relative_error(many[0], many[1]) > 1e-3
    assert relative_error(many.mean(0), exact) < 0.02
    base = x @ frozen["blocks.0.attn.q_proj.weight"] + frozen["blocks.0.attn.q_proj.bias"]
    nothing = adapted_decoder(graphdef, frozen, jax.tree.map(jnp.zeros_like, factors), jax.random.key(0))
    assert relative_error(nothing.blocks[0].attn.q_proj(x), base) <= tolerance("f64")  # its input is whole
    spread = ((many - base) ** 2).mean((0, 2)) - ((whole - base) ** 2).mean(-1)
    a, b = (factors[f"blocks.0.attn.q_proj.weight.{name}"] for name in ("lora_a", "lora_b"))
    each = (x[..., None] * (a @ b) * 5.0 / 3) ** 2  # of every input, whose variance is rate / (1 - rate)
    assert relative_error(spread, each.sum(1).mean(-1) * 0.4 / 0.6) < 0.1


def test_dropout_is_independent() -> None:
    """No two adapters share a key, nor does the decoder's own dropout have one of theirs."""
    run = tuned(tiny(n_layers=3), AdapterConfig(1, 1.0, dropout=0.1), dtype="float32", param_dtype="float32")
    key, zeros = jax.random.key(3), {k: jnp.zeros(s.shape, s.dtype) for k, s in adapted(run).shapes.items()}
    frozen = {k: jnp.zeros(s.shape, s.dtype) for k, s in adapted(run).frozen_shapes.items()}
    decoder = adapted_decoder(adapted(run).graphdef, frozen, zeros, key)
    linears = [
        getattr(owner, name)
        for block in decoder.blocks
        for owner, names in ((block.attn, "qkvo"), (block.mlp, ("gate", "up", "down")))
        for name in (f"{one}_proj" for one in names)
    ]
    keys = [linear.key[...] for linear in linears]
    own = split_key(key, 4)
    keys += [k for k in (*own, *(part for one in own for part in split_key(one, 2))) if k is not None]
    assert len({jax.random.key_data(one).tobytes() for one in keys}) == 21 + 4 + 8


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_every_remat_policy_gives_the_same_gradients(quant: str, x64: None) -> None:
    """What is recomputed drops the same inputs out again, and dequantises to the same weights."""
    targets = (r".*_proj\.weight",)
    model = tiny({} if quant == "nf4" else None, n_layers=1)
    results = []
    for remat in ("none", "dots", "block"):
        run = tuned(model, AdapterConfig(2, 4.0, 0.3, targets=targets), quant, remat=remat)
        frozen, compute = freeze(run, random_params(model)), make_gradient_fn(run, task=sft_task(run))
        results.append(
            quick_jit(compute)(random_factors(run), hard_batch(), jax.random.key(5), None, frozen)[0]
        )
    for other in results[1:]:
        assert_close(tree_errors(other, results[0]), tolerance("f64"), "gradients")


@pytest.mark.parametrize(
    "quant",
    ["nf4", pytest.param("int8", marks=pytest.mark.slow), pytest.param("int4", marks=pytest.mark.slow)],
)
def test_a_quantised_base_is_its_dequantised_weights(quant: str, x64: None) -> None:
    """Loss and gradients are those of an adapter on the weights that the codes stand for."""
    run = tuned(MIXED, dataclasses.replace(ADAPTER, targets=PROJECTIONS), quant)
    frozen, factors = freeze(run, random_params(MIXED)), random_factors(run)
    ours, metrics = gradients(run, factors, frozen)
    plain = dataclasses.replace(run, tune=dataclasses.replace(run.tune, quant="none"))
    theirs, expected = gradients(plain, factors, wide_weights(run, frozen))
    assert relative_error(metrics["loss"], expected["loss"]) <= tolerance("f64_quant")
    assert_close(tree_errors(ours, theirs), tolerance("f64_quant"), "gradients")


def test_between_the_passes_a_quantised_base_is_codes_alone() -> None:
    """Nothing as large as a weight is kept for the backward pass, also where nothing is recomputed."""
    for quant, remat in (("nf4", "none"), ("nf4", "dots"), ("none", "none")):
        run = tuned(MIXED, AdapterConfig(2, 4.0), quant, dtype="float32", param_dtype="float32", remat=remat)
        form, task = adapted(run), sft_task(run)
        shapes = abstract_model(MIXED).shapes
        weights = {s.shape for path, s in shapes.items() if is_quantized(path)}
        weights |= {(*shape[:-2], shape[-1], shape[-2]) for shape in weights}
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in hard_batch().items()}

        def loss(factors: Any, frozen: Any, ids: Any, graphdef: Any = form.graphdef) -> Any:
            return (adapted_decoder(graphdef, frozen, factors).hidden(ids)[0] ** 2).sum()

        kept = saved_residuals(loss, task.shapes, task.frozen_shapes, batch["inputs"])
        large = [x for x, where in kept if "argument" not in where and x.shape in weights]
        assert bool(large) == (quant == "none"), large


def frozen_products(run: TuneRun) -> tuple[list[str], float]:
    """Products of a compiled step that result in a gradient of a weight of the model, and all products' operations."""
    task = pretraining(run) if run.tune.adapter is None else sft_task(run)
    B, T = run.train.batch_size, run.train.seq_len
    ids = jax.ShapeDtypeStruct((B, T), np.int32)
    batch = {"inputs": ids, "targets": ids, "loss_mask": jax.ShapeDtypeStruct((B, T), np.float32)}
    compute = quick_jit(make_gradient_fn(run, task=task))
    text = compute.lower(task.shapes, batch, None, None, task.frozen_shapes).compile().as_text()
    shapes = {s.shape[-2:] for s in abstract_model(run.model).shapes.values() if len(s.shape) > 1}
    shapes |= {shape[::-1] for shape in shapes}
    dots = [one for one in hlo.instructions(text, fused=True) if one.operation in ("dot", "custom-call")]
    return [str(one.arrays) for one in dots if one.arrays and one.arrays[0][1] in shapes], hlo.dot_flops(text)


@pytest.mark.parametrize(
    "moe", [None, pytest.param({"n_experts": 2, "n_active": 1, "d_ff": 56}, marks=pytest.mark.slow)]
)
def test_frozen_weights_have_no_gradient(moe: Any) -> None:
    """No product makes one, of the head and the experts neither: about two thirds of full fine-tuning remain."""
    model = tiny(moe, n_layers=1, d_model=72, d_ff=88, vocab_size=104, context=256)
    options = {"dtype": "float32", "param_dtype": "float32", "batch_size": 2, "seq_len": 160}
    left, rest = frozen_products(tuned(model, AdapterConfig(1, 1.0, targets=PROJECTIONS[:2]), **options))
    assert not left
    if moe is None:
        full, all_of_it = frozen_products(tuned(model, None, **options))
        assert full
        assert rest < 0.75 * all_of_it, rest / all_of_it


@pytest.mark.parametrize(
    ("mesh", "quant"),
    [("fsdp=2,tensor=2,expert=2", "none"), pytest.param("data=2", "nf4", marks=pytest.mark.slow)],
)
def test_a_mesh_computes_what_one_device_does(mesh: str, quant: str, x64: None) -> None:
    """Gradients of split factors on a split base, of experts too, and of a quantised one on every device."""
    model, adapter = (
        tiny({}, n_layers=1),
        dataclasses.replace(ADAPTER, targets=(*PROJECTIONS, r"lm_head\.weight")),
    )
    alone, run = tuned(model, adapter, quant), tuned(model, adapter, quant, mesh=MeshConfig.parse(mesh))
    frozen, factors = freeze(run, random_params(model)), random_factors(run)
    expected, _ = gradients(alone, factors, frozen)
    devices, task = make_mesh(run.mesh), sft_task(run)
    placed = jax.device_put(frozen, frozen_shardings(devices, task))
    with jax.set_mesh(devices):
        state = init_state(run, devices, task, dict(factors))
        compute = quick_jit(make_gradient_fn(run, task=task))
        found, _ = compute(state.params, place_batch(hard_batch(), devices), None, None, placed)
    assert_close(tree_errors(found, expected), tolerance("f64_mesh"), "gradients")


def test_adapters_are_switched_without_compiling(x64: None) -> None:
    """Two adapters of unlike ranks, none, and sums of both: each is its merged weights, with two programs in all."""
    one, two = AdapterConfig(3, 5.0), AdapterConfig(2, 3.0, rslora=True, targets=PROJECTIONS[:1])
    runs = tuned(DENSE, one), tuned(DENSE, two)
    base, ids, traced = freeze(runs[0], random_params(DENSE)), jnp.asarray(hard_batch()["inputs"]), []
    factors = [random_factors(run, seed) for seed, run in enumerate(runs)]
    adapters = Adapters(DENSE, base, {"one": (one, factors[0]), "two": (two, factors[1])})

    @jax.jit
    def merged(params: Any) -> Any:
        return merge_model(abstract_model(DENSE).graphdef, params)(ids)[0]

    def forward(graphdef: Any, params: Any) -> Any:
        traced.append(graphdef)
        return merge_model(graphdef, params)(ids)[0]

    run = jax.jit(forward, static_argnums=0)
    half = {k: 0.5 * v if k.endswith("lora_b") else v for k, v in factors[0].items()}
    minus = {k: -2.0 * v if k.endswith("lora_b") else v for k, v in factors[1].items()}
    cases = {
        None: base,
        "one": merge(base, factors[0], one),
        "two": merge(base, factors[1], two),
        (("one", 0.5),): merge(base, half, one),
        (("one", 0.5), ("two", -2.0)): merge(merge(base, half, one), minus, two),
        (("two", 1.0), ("one", 1.0)): merge(merge(base, factors[0], one), factors[1], two),
    }
    for chosen, expected in cases.items():
        model = adapters.model(dict(chosen) if isinstance(chosen, tuple) else chosen)
        assert relative_error(run(*model), merged(expected)) <= tolerance("f64_peft"), chosen
    assert len(traced) == 2
    with pytest.raises(ConfigError, match="no adapter is named 'tow' .did you mean 'two'"):
        adapters.model("tow")
    with pytest.raises(ConfigError, match="adapter 'wrong' does not fit: .* expected"):
        Adapters(DENSE, base, {"wrong": (one, factors[1])})


@pytest.mark.parametrize("quant", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_answers_are_those_of_the_merged_model(quant: str, x64: None) -> None:
    """Decoding with the adapter beside the base gives what merged weights give, token for token."""
    run = tuned(DENSE, AdapterConfig(3, 50.0), quant, remat="block")
    frozen, factors = freeze(run, random_params(DENSE)), random_factors(run)
    settings, prompts = Sampling(max_new_tokens=6, greedy=True, logprobs=True), [[3, 1, 4], [1, 5]]
    ours = decode(generation_model(run, frozen, factors), prompts, settings)
    assert run.tune.adapter is not None
    weights = merge(wide_weights(run, frozen), factors, run.tune.adapter)
    theirs = decode(Split(abstract_model(DENSE).graphdef, weights), prompts, settings)
    assert [answers[0].ids for answers in ours] == [answers[0].ids for answers in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine[0].logprobs, other[0].logprobs) <= tolerance("f64_decode")


def test_a_base_is_read_tensor_by_tensor() -> None:
    """What has a read() is read once, when its turn comes; what is missing or misshapen is named."""

    class Lazy:
        def __init__(self, path: str, value: np.ndarray):
            self.path, self.value, self.shape = path, value, value.shape

        def read(self) -> np.ndarray:
            read.append(self.path)
            return self.value

    read: list[str] = []
    run = tuned(DENSE, AdapterConfig(2, 2.0), "nf4", dtype="bfloat16", param_dtype="float32")
    base = random_params(DENSE, dtype=np.float32)
    frozen = freeze(run, {path: Lazy(path, value) for path, value in base.items()})
    assert read == list(base)
    assert {k: (v.shape, v.dtype) for k, v in frozen.items()} == {
        k: (v.shape, v.dtype) for k, v in adapted(run).frozen_shapes.items()
    }
    with pytest.raises(InputError, match=r"final_norm\.weight is missing"):
        freeze(run, {path: value for path, value in base.items() if path != "final_norm.weight"})
    with pytest.raises(InputError, match=r"q_proj\.weight: a weight holds NaN"):
        freeze(run, base | {"blocks.0.attn.q_proj.weight": base["blocks.0.attn.q_proj.weight"] * np.nan})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"targets": ("q_proj",)},
            r"'q_proj' matches no weight .*near: blocks\.\\d\+\.attn\.q_proj\.weight,",
        ),
        ({"targets": (r".*\.up_porj\.weight",)}, r"near: blocks\.\\d\+\.(mlp|moe\.shared)\.up_proj\.weight"),
        ({"targets": (*PROJECTIONS, r"lm_haed\.weight")}, r"near: lm_head\.weight"),
        ({"targets": (r"embed\.weight",)}, r"matches embed\.weight, which carries no adapter"),
        ({"overrides": (Override("router", 2, 2.0),)}, r"overrides: 'router' matches no adapted weight"),
    ],
)
def test_targets_that_match_nothing_are_refused(changes: Any, message: str) -> None:
    """One line that names the expression and the weights that come near; the default targets need not all match."""
    adapter = AdapterConfig(2, 2.0, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        adapted(tuned(MIXED, adapter))
    assert "\n" not in str(error.value)
    check_targets(AdapterConfig(2, 2.0), abstract_model(DENSE).shapes)
    with pytest.raises(ConfigError, match="match no weight of this model; it has"):
        check_targets(AdapterConfig(2, 2.0, targets=PROJECTIONS[2:]), abstract_model(DENSE).shapes)


def test_dropout_of_what_has_none_is_refused() -> None:
    """The head's adapter is part of its weight: nothing could be dropped before it."""
    with pytest.raises(
        ConfigError, match=r"lora\.dropout=0\.1: the adapter of lm_head\.weight has no dropout"
    ):
        adapted(tuned(DENSE, AdapterConfig(2, 2.0, 0.1, targets=(r"lm_head\.weight",))))
