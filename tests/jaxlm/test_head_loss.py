"""The loss that forms its gradients in the forward pass: the plain one's values, in less memory and fewer products."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, quick_jit, relative_error, tree_errors
from tolerances import tolerance

from jaxlm import head_loss as module
from jaxlm.head_loss import Options, head_loss
from jaxlm.hlo import instructions
from jaxlm.loss import chunked_token_loss, token_loss

D, V = 10, 61
NAMES, ORDER = ("hidden", "weight", "bias", "mask"), ("hidden", "weight", "bias", "targets", "mask")


def inputs(tokens: int, seed: int = 0) -> dict[str, Any]:
    """hidden, weight, bias, targets and a mask of fractions and zeros, in float64."""
    rng = np.random.default_rng(seed)
    mask = rng.random(tokens) * (rng.random(tokens) < 0.7)
    made = {name: rng.standard_normal(s) for name, s in (("hidden", (tokens, D)), ("weight", (D, V)))}
    made |= {"bias": rng.standard_normal(V), "targets": rng.integers(0, V, tokens), "mask": mask}
    return {name: jnp.asarray(x) for name, x in made.items()}


def plain(given: dict[str, Any], z_coef: float) -> Any:
    """The full form of the same call."""
    rows = {name: given[name][None] for name in ("hidden", "targets", "mask")}
    return token_loss(weight=given["weight"], bias=given["bias"], **rows, z_coef=z_coef, entropy=True)


def fused(given: dict[str, Any], z_coef: float, form: module._Form) -> Any:
    """What a platform that likes this form computes: its sums, and gradients for a cotangent of one."""
    options = Options(z_coef, None, True)

    def run(given: dict[str, Any]) -> Any:
        order = (given[name] for name in ORDER)
        tokens, gradients = module._over_chunks(options, True, form, *order)
        return module._sums(options, tokens, given["mask"]), gradients

    return quick_jit(run)(given)


@pytest.mark.parametrize("upright", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    ("tokens", "chunk", "bias"), [(24, 24, True), (24, 6, False), (23, 5, True), (7, 1, True)]
)
def test_sums_and_gradients_are_the_plain_forms(
    tokens: int, chunk: int, bias: bool, upright: bool, x64: None
) -> None:
    """One chunk, chunks that divide the tokens, a prime number of tokens, a chunk for each; as CPU and GPU do it."""
    given = inputs(tokens) | ({} if bias else {"bias": None})
    names = [name for name in NAMES[:3] if given[name] is not None]

    def loss(trained: dict[str, Any]) -> Any:
        made = plain(given | trained, 0.1)
        return made.loss, made

    oracle = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, want), gradients = oracle({name: given[name] for name in names})
    form = module._Form(chunk, upright)
    found, own = fused(given, 0.1, form)
    for term in want._fields:
        assert relative_error(getattr(found, term), getattr(want, term)) <= tolerance("f64"), term
    own = {name: getattr(own, name) for name in names}
    assert_close(tree_errors(own, gradients), tolerance("f64"), "gradients")


def test_padding_of_the_vocabulary_is_excluded_exactly(x64: None) -> None:
    """Where every logit is far below zero, a column of zeros would take all probability."""
    given = inputs(24)
    given["bias"] = given["bias"] - 1e6
    assert V % module.LANES, "nothing would be padded"
    given_shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in given.items()}
    order = [given_shapes[name] for name in ORDER]
    over_chunks = functools.partial(
        module._over_chunks, Options(0.0, None, False), True, module._Form(6, True)
    )
    assert f",{V + -V % module.LANES}]" in str(jax.make_jaxpr(over_chunks)(*order))
    for upright in (True, False):
        found, gradients = fused(given, 0.0, module._Form(6, upright))
        oracle = quick_jit(jax.value_and_grad(lambda w: plain(given | {"weight": w}, 0.0).loss))
        want, by_weight = oracle(given["weight"])
        assert relative_error(found.loss, want) <= tolerance("f64")
        assert relative_error(gradients.weight, by_weight) <= tolerance("f64")


def test_the_rule_scales_by_the_cotangent_and_knows_the_mask(x64: None) -> None:
    """Behind another function, for every argument: also the mask's gradient, the loss of each token."""
    given = inputs(23)

    def through(form: Any) -> Any:
        run = lambda trained: jnp.sin(3 * form(given | trained).loss)  # noqa: E731
        return quick_jit(jax.grad(run))({name: given[name] for name in NAMES})

    def chunked(given: dict[str, Any]) -> Any:
        order = (given[name] for name in ORDER)
        return head_loss(Options(0.1, 5 * V, False), *order)

    errors = tree_errors(through(chunked), through(lambda given: plain(given, 0.1)))
    assert_close(errors, tolerance("f64"), "gradients")


@pytest.mark.parametrize("form", [token_loss, functools.partial(chunked_token_loss, chunk_logits=5 * V)])
def test_only_the_loss_carries_a_gradient(form: Any, x64: None) -> None:
    """The other terms are told, not trained on, in both forms alike."""
    given = inputs(23)
    rows = {name: given[name][None] for name in ("hidden", "targets", "mask")}

    def told(weight: Any) -> Any:
        made = form(weight=weight, bias=None, **rows, z_coef=0.1, entropy=True)
        return made.cross_entropy + made.z + made.entropy

    assert not np.asarray(quick_jit(jax.grad(told))(given["weight"])).any()


@pytest.mark.parametrize("target", [-1, V, 2**30])
def test_a_target_outside_of_the_vocabulary_has_no_logit(target: int, x64: None) -> None:
    """As in the plain form; padding tokens often have one, and their zero weight must not meet a NaN."""
    given = inputs(23)
    given["targets"] = given["targets"].at[:4].set(target)
    given["mask"] = given["mask"].at[:2].set(0).at[2:4].set(1)
    by_weight = quick_jit(jax.grad(lambda w: plain(given | {"weight": w}, 0.1).loss))(given["weight"])
    found, gradients = fused(given, 0.1, module._Form(5, True))
    assert relative_error(found.loss, plain(given, 0.1).loss) <= tolerance("f64")
    assert relative_error(gradients.weight, by_weight) <= tolerance("f64")


def test_a_platform_forms_gradients_only_where_they_are_wanted() -> None:
    """One product of tokens and weights to evaluate, three to train: 2 and 6 operations per weight and token."""
    given = {name: x.astype(jnp.float32) for name, x in inputs(24).items() if name != "bias"}
    targets = given.pop("targets").astype(jnp.int32)

    def run(given: dict[str, Any]) -> Any:
        options = Options(0.1, 6 * V, False)
        return head_loss(options, given["hidden"], given["weight"], None, targets, given["mask"]).loss

    def products(function: Any) -> int:
        text = jax.jit(function).lower(given).compile().as_text() or ""
        return sum(one.operation == "dot" for one in instructions(text, fused=True))

    assert (products(run), products(jax.grad(run))) == (1, 3)


def _compiled(tokens: int, tied: bool = False) -> Any:
    """The loss and gradients of hidden states and head in float32, for V 1,031 and D 16."""
    shapes = {"hidden": (tokens, 16), "weight": (1031, 16) if tied else (16, 1031), "mask": (tokens,)}
    given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def run(given: dict[str, Any], targets: Any) -> Any:
        weight = given["weight"].T if tied else given["weight"]
        options = Options(0.1, None, False)
        return head_loss(options, given["hidden"], weight, None, targets, given["mask"]).loss

    return jax.jit(jax.grad(run)).lower(given, jax.ShapeDtypeStruct((tokens,), jnp.int32)).compile()


def test_memory_does_not_know_tokens_times_vocabulary() -> None:
    """Four times the tokens: more hidden states and no more logits; and no scatter."""
    few, many = (_compiled(module.CPU_TOKENS * n) for n in (4, 16))
    memory: Any = [program.memory_analysis() for program in (few, many)]
    more = memory[1].temp_size_in_bytes - memory[0].temp_size_in_bytes
    assert (
        more <= 12 * module.CPU_TOKENS * 4 * 64
    )  # some arrays of hidden states, less than 1/16 of the logits
    assert " scatter(" not in many.as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_no_more_than_the_plain_form(dtype: str, x64: None) -> None:
    """Against float64, over 64 chunks: sums over chunks are float32, and what is small is not yet divided."""
    exact = inputs(512)
    exact["mask"] = jnp.ones(512)
    factor = (
        1 if dtype == "float16" else 2.0**-16
    )  # its loss is scaled, by about as much as the mean takes away
    half = {
        name: x if name in ("targets", "mask") else x.astype(dtype).astype(jnp.float64)
        for name, x in exact.items()
    }

    def gradients(form: Any, dtype: str) -> dict[str, Any]:
        """Of the mean, as training takes it."""
        given = {name: x.astype(dtype) for name, x in half.items() if name not in ("targets", "mask")}
        rest = {"targets": exact["targets"], "mask": exact["mask"].astype(jnp.float32)}
        return quick_jit(jax.grad(lambda given: form(given | rest, 1e-4).loss * factor))(given)

    def chunked(given: dict[str, Any], z_coef: float) -> Any:
        order = (given[name] for name in ORDER)
        return head_loss(Options(z_coef, 8 * V, False), *order)

    want = gradients(plain, "float64")
    ours, theirs = (
        tree_errors({k: g.astype(jnp.float64) for k, g in gradients(form, dtype).items()}, want)
        for form in (chunked, plain)
    )
    assert all(ours[name] <= 1.25 * theirs[name] for name in ours), (ours, theirs)


@pytest.mark.slow
@pytest.mark.bench
def test_a_large_vocabulary_costs_an_eighth_of_the_memory_and_no_time() -> None:
    """8,192 tokens, D 512, V 200,064, float32: against all logits at once, the best of 3 repetitions each."""
    tokens, width, vocabulary = 8192, 512, 200_064
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, tokens, width), np.float32))
    weight = jnp.asarray(rng.standard_normal((width, vocabulary), np.float32) / width**0.5)
    targets = jnp.asarray(rng.integers(0, vocabulary, (1, tokens)), jnp.int32)
    mask = jnp.ones((1, tokens), jnp.float32)
    memory, seconds = [], []
    for form in (chunked_token_loss, token_loss):
        run = lambda h, w: form(h, w, None, targets, mask).loss  # noqa: B023, E731
        compiled = jax.jit(jax.grad(run, (0, 1))).lower(hidden, weight).compile()
        analysis: Any = compiled.memory_analysis()
        memory.append(analysis.temp_size_in_bytes)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(compiled(hidden, weight))
            times.append(time.perf_counter() - started)
        seconds.append(min(times))
    print(f"extra bytes {memory}, seconds {seconds}")
    assert memory[0] <= memory[1] / 8 and seconds[0] <= 1.1 * seconds[1]
