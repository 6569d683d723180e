"""What the machine and the frameworks can do at best: products, copies, sums of rows by index."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.bench.cases import Case
from convert.bench.layers import jax_side, leaf, normal, torch_side
from convert.bench.results import OURS
from convert.bench.side import Side

SKEW = 1.1  # exponent of the ids' distribution, about that of words


def make(case: Case, name: str) -> Side:
    """A side of a probe."""
    kind = case.name.partition("/")[0]
    return {"gemm": _product, "copy": _copy, "scatter": _scatter}[kind](case, name == OURS)


def _product(case: Case, ours: bool) -> Side:
    o = case.options
    a, b = normal(1, (o["m"], o["k"])), normal(2, (o["k"], o["n"]))
    if ours:
        return jax_side(jax.jit(jnp.matmul), jnp.asarray(a, case.dtype), jnp.asarray(b, case.dtype))
    x, y = leaf(a, case.dtype).detach(), leaf(b, case.dtype).detach()
    return torch_side(lambda: [x @ y])


def _copy(case: Case, ours: bool) -> Side:
    size = case.options["size"] // 4
    if ours:
        return jax_side(jax.jit(lambda x: x + 1), jnp.ones(size, jnp.float32))
    x = leaf(np.ones(size, np.float32), "float32").detach()
    return torch_side(lambda: [x + 1])


def _scatter(case: Case, ours: bool) -> Side:
    o = case.options
    rng: Any = np.random.default_rng(0)
    ids = np.zeros(o["rows"], np.int32)
    if o["ids"] == "zipf":
        ids = ((rng.zipf(SKEW, o["rows"]) - 1) % o["vocab"]).astype(np.int32)
    rows = np.abs(normal(1, (o["rows"], o["d"])))
    if ours:

        def add(rows: jax.Array, ids: jax.Array) -> jax.Array:
            return jnp.zeros((o["vocab"], o["d"]), rows.dtype).at[ids].add(rows)

        return jax_side(jax.jit(add), jnp.asarray(rows, case.dtype), jnp.asarray(ids))
    x = leaf(rows, case.dtype).detach()
    index = torch.from_numpy(ids).to(x.device, torch.long)

    def step() -> list[torch.Tensor]:
        return [torch.zeros(o["vocab"], o["d"], dtype=x.dtype, device=x.device).index_add_(0, index, x)]

    return torch_side(step)
