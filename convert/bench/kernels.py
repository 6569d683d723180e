"""The grouped products of a mixture one by one: jaxlm's kernels, cut in several ways, beside torch._grouped_mm.

    up      [S, D] x [D, 2F] with the activation        down      [S, F] x [F, D]
    d_rows  [S, 2F] x [2F, D], up transposed            d_weights [D, S] x [S, 2F] per expert

Results are compared in the order of the assignments; only the products are timed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

from convert.bench import torch_parts
from convert.bench.cases import Case
from convert.bench.layers import leaf, normal, told, torch_side
from convert.bench.results import OURS
from convert.bench.side import Side
from jaxlm.dispatch import Blocks, KernelPlan, Kernels, sort_by_expert
from jaxlm.grouped_kernels import experts_d_weights, experts_rows, experts_up, tiles_of


def make(case: Case, name: str) -> Side:
    """A side of a grouped product."""
    return _ours(case) if name == OURS else _theirs(case)


def _inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Expert of each of S assignments, rows [S, in], weights [E, in, out] and, for d_weights, gradients [S, out]."""
    o = case.options
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, o["e"] + 1) if o["groups"] == "zipf" else np.ones(o["e"])
    ids = rng.choice(o["e"], o["s"], p=share / share.sum()).astype(np.int32)
    weights = normal(2, (o["e"], o["inner"], o["columns"]), o["inner"] ** -0.5)
    return ids, normal(1, (o["s"], o["inner"])), weights, normal(3, (o["s"], o["columns"]))


def _ours(case: Case) -> Side:
    o = case.options
    ids, rows, weights, grads = _inputs(case)
    kernels, tile = Kernels(), o["tile"]
    if "cut" in o:
        field = "d_weights" if o["product"] == "d_weights" else o["product"]
        kernels = kernels._replace(**{field: Blocks(*o["cut"])})
    plan = KernelPlan("swiglu", 0.0, tile, kernels)

    @jax.jit
    def prepare(ids: Array, rows: Array, grads: Array) -> Any:
        layout = sort_by_expert(ids[:, None], o["e"], tile)
        kept = layout.filled[:, None]
        return (
            layout.slot[:, 0],
            tiles_of(layout, tile),
            jnp.where(kept, rows[layout.assignment], 0),
            jnp.where(kept, grads[layout.assignment], 0),
        )

    half = [jnp.asarray(x, case.dtype) for x in (rows, weights, grads)]
    slot, tiles, rows_S, grads_S = prepare(jnp.asarray(ids), half[0], half[2])
    matrix = (
        half[1].swapaxes(1, 2) if o["product"] == "d_rows" else half[1]
    )  # lies as its forward product wants it

    def product(tiles: Any, rows: Array, matrix: Array, grads: Array) -> Array:
        match o["product"]:
            case "up":
                h, hidden = experts_up(tiles.owner, rows, matrix, None, None, plan, True)
                assert h is not None
                return h
            case "d_weights":
                return experts_d_weights(tiles, rows, grads, tile, kernels.d_weights)
            case _:
                back = o["product"] == "d_rows"
                cut = kernels.d_rows if back else kernels.down
                return experts_rows(tiles.owner, rows, matrix, None, tile, cut, back)

    step = jax.jit(product)

    def run(n: int) -> None:
        out = None
        for _ in range(n):
            out = step(tiles, rows_S, matrix, grads_S)
        jax.block_until_ready(out)

    def trace() -> list[float]:
        out = step(tiles, rows_S, matrix, grads_S)
        return told([out if o["product"] == "d_weights" else out[slot]])

    return Side(run, trace)


def _theirs(case: Case) -> Side:
    o = case.options
    ids, rows, weights, grads = _inputs(case)
    order = np.argsort(ids, kind="stable")
    back = torch.from_numpy(np.argsort(order)).to(torch_parts.device())
    ends = torch.from_numpy(np.bincount(ids, minlength=o["e"]).cumsum().astype(np.int32)).to(back.device)
    x, g = (leaf(np.ascontiguousarray(part[order]), case.dtype).detach() for part in (rows, grads))
    w = (
        leaf(np.ascontiguousarray(weights.swapaxes(1, 2)), case.dtype).detach().mT
    )  # column-major, as torch wants it

    def step() -> list[torch.Tensor]:
        if o["product"] == "d_weights":
            return [torch._grouped_mm(x.T, g, ends)]
        return [torch._grouped_mm(x, w, ends)]

    side = torch_side(step)
    in_order = o["product"] != "d_weights"
    return Side(side.run, lambda: told([step()[0][back] if in_order else step()[0]]))
