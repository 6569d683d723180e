"""Every fast path in half precision against its plain form in float32, on whatever device: relative errors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from convert.bench.cases import Case, plain
from convert.bench.layers import normal
from convert.bench.side import Side
from jaxlm.attention import Attention, Visibility
from jaxlm.grouped import ExpertWeights, expert_mlp
from jaxlm.layers import Backends
from jaxlm.loss import chunked_token_loss, token_loss
from jaxlm.model import abstract_model, init_params, merge_model
from jaxlm.presets import preset
from jaxlm.train import cast_params


def make(case: Case, name: str) -> Side:
    """jaxlm against itself: the worst relative error of the results and gradients."""
    what, small = case.options["what"], case.options["small"]
    kind = what.partition("-")[0]
    with jax.default_matmul_precision("highest"):  # float32 on a GPU would be TF32
        error, parts = {"attention": _attention, "moe": _moe, "head": _head, "logits": _logits}[kind](
            what, small
        )
    if not error <= case.facts.tolerance:
        raise ArithmeticError(
            f"{what}: relative error {error:.2g}, limit {case.facts.tolerance:.2g} ({parts})"
        )
    return Side(lambda n: None, list, value=error, notes={"errors": parts})


def distance(value: Any, exact: Any) -> float:
    """|value - exact| / |exact| in the Euclidean norm."""
    a, b = (np.asarray(x, np.float32).astype(np.float64) for x in (value, exact))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def _worst(names: str, values: Any, exact: Any) -> tuple[float, dict[str, float]]:
    pairs = zip(names.split(), jax.tree.leaves(values), jax.tree.leaves(exact), strict=True)
    errors = {name: distance(value, best) for name, value, best in pairs}
    return max(errors.values()), errors


def _attention(what: str, small: bool) -> tuple[float, dict[str, float]]:
    length, window = (32, 8) if small else (1_024, 256)
    sizes = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "context": length}
    base = preset("quickstart-dense").model
    config = dataclasses.replace(base, **sizes, windows=(window if "window" in what else 0,))
    shapes = [
        (2, length, config.n_heads, 64),
        (2, length, 2, 64),
        (2, length, 2, 64),
        (2, length, config.n_heads, 64),
    ]
    arrays = [normal(i, shape) for i, shape in enumerate(shapes)]
    index = jnp.arange(length, dtype=jnp.int32)

    def results(backend: Any, dtype: Any) -> Any:
        layer = Attention(config, 0, Backends(attention=backend), rngs=nnx.Rngs(params=0), dtype=dtype)

        def loss(q: Array, k: Array, v: Array, seen: Array) -> tuple[Array, Array]:
            out, _ = layer.attend(q, k, v, Visibility(index, index, None, None), cached=False)
            return jnp.sum((out * seen).astype(jnp.float32)), out

        rounded = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in arrays]
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*rounded)
        return out, grads

    return _worst("out dq dk dv", results("auto", jnp.bfloat16), results("readable", jnp.float32))


def _moe(what: str, small: bool) -> tuple[float, dict[str, float]]:
    p, e, a, d, f = (64, 4, 2, 16, 24) if small else (4_096, 32, 2, 512, 1_024)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, e - 1, (p, a)), jnp.int32)  # nobody chooses the last
    combine = jnp.asarray(rng.random((p, a)), jnp.float32)
    x, seen = normal(1, (p, d)), normal(2, (p, d))
    up, down = normal(3, (e, d, 2 * f), d**-0.5), normal(4, (e, f, d), f**-0.5)

    def results(backend: Any, dtype: Any) -> Any:
        def loss(x: Array, up: Array, down: Array, combine: Array, seen: Array) -> tuple[Array, Array]:
            weights = ExpertWeights(up, None, down, None)
            out = expert_mlp(x, weights, ids, combine, activation="swiglu", backend=backend)
            return jnp.sum((out * seen).astype(jnp.float32)), out

        half: Callable[[Any], Array] = lambda x: jnp.asarray(x, jnp.bfloat16).astype(dtype)  # noqa: E731
        arguments = (half(x), half(up), half(down), half(combine), half(seen))
        grads, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arguments)
        return out, grads

    return _worst("out dx d_up d_down d_combine", results("auto", jnp.bfloat16), results("loop", jnp.float32))


def _head(what: str, small: bool) -> tuple[float, dict[str, float]]:
    tokens, d, vocab = (64, 16, 320) if small else (8_192, 512, 32_003)
    hidden, weight = normal(1, (1, tokens, d)), normal(2, (d, vocab), 0.05)
    targets = np.random.default_rng(3).integers(0, vocab, (1, tokens), dtype=np.int32)
    mask = np.ones((1, tokens), np.float32)

    def results(form: Callable[..., Any], dtype: Any) -> Any:
        def loss(hidden: Array, weight: Array) -> Array:
            return form(hidden, weight, None, targets, mask).loss

        half = [jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (hidden, weight)]
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(*half)

    return _worst("loss dx dw", results(chunked_token_loss, jnp.bfloat16), results(token_loss, jnp.float32))


def _logits(what: str, small: bool) -> tuple[float, dict[str, float]]:
    name = {
        "gptoss": "quickstart" if small else "gptoss",
        "llama": "quickstart-dense" if small else "llama-1.1b",
    }
    run = plain(preset(name[what.partition("-")[2]]))
    config = dataclasses.replace(run.model, n_layers=2)
    rows, length = (2, 32) if small else (2, 512)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    params = jax.jit(lambda: init_params(config, 0))()

    def logits(backends: Backends, dtype: Any, chosen: Any = None) -> Any:
        graphdef = abstract_model(config, backends).graphdef

        @jax.jit
        def run_model(params: Any) -> Any:
            out, acts, _ = merge_model(graphdef, cast_params(params, dtype))(ids, expert_ids=chosen)
            routed = [acts.get(f"blocks.{i}.moe.expert_ids") for i in range(config.n_layers)]
            return out, None if routed[0] is None else jnp.stack(routed, axis=2)

        return run_model(params)

    # Where the router is nearly undecided, rounding may choose other experts: both take the exact form's choice.
    params = {k: v.astype(jnp.float32) for k, v in cast_params(params, jnp.bfloat16).items()}
    exact, routing = logits(Backends(attention="readable", experts="loop"), jnp.float32)
    found, _ = logits(Backends(), jnp.bfloat16, routing)
    error = distance(found, exact)
    return error, {"logits": error}
