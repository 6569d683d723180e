"""What fine-tuning by an adapter will need, by arithmetic alone: `jaxlm.estimate` for a frozen base. No framework.

The base lies in the dtype of the computation, or quantised, and has neither gradient nor moments; of the factors there
are masters, moments and gradients, as of all weights in training.
"""

import math

from jaxlm.adapter_config import AdapterConfig, factor_shapes
from jaxlm.config import ModelConfig
from jaxlm.count import flops_per_token, matmul_param_count, param_count
from jaxlm.estimate import (
    SIZES,
    Budget,
    Device,
    Memory,
    budget,
    chunk_bytes,
    fuses_attention,
    kept_activations,
    layer_activations,
    layer_backward,
    memory,
    moment_bytes,
    shares,
)
from jaxlm.tune_config import TuneRun

BITS = {"int8": 8.0, "int4": 4.5, "nf4": 4.127}  # of a quantised weight, scales included: jaxlm/quant.py


def matrix_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes [in, out], of experts [E, in, out], of every weight that may carry an adapter, by its path."""
    D, moe = model.d_model, model.moe
    q, kv, gated = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.mlp == "swiglu"

    def mlp(where: str, width: int) -> dict[str, tuple[int, ...]]:
        gate = {f"{where}.gate_proj.weight": (D, width)} if gated else {}
        return gate | {f"{where}.up_proj.weight": (D, width), f"{where}.down_proj.weight": (width, D)}

    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(model.n_layers):
        block = f"blocks.{i}"
        columns = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
        shapes |= {f"{block}.attn.{name}_proj.weight": shape for name, shape in columns.items()}
        if not model.is_moe(i):
            shapes |= mlp(f"{block}.mlp", model.d_ff)
            continue
        F, up = model.expert_d_ff, "gate_up" if gated else "up"
        shapes[f"{block}.moe.router.weight"] = (D, moe.n_experts)
        shapes[f"{block}.moe.experts.{up}"] = (moe.n_experts, D, 2 * F if gated else F)
        shapes[f"{block}.moe.experts.down"] = (moe.n_experts, F, D)
        shapes |= mlp(f"{block}.moe.shared", moe.shared_d_ff) if moe.shared_d_ff else {}
        shapes |= {f"{block}.moe.shared_gate.weight": (D, 1)} if moe.shared_gate else {}
    return shapes | ({} if model.tied else {"lm_head.weight": (D, model.vocab_size)})


def factor_count(model: ModelConfig, adapter: AdapterConfig, active: bool = False) -> int:
    """Parameters of the adapter; active: those that one token uses, of the experts it is routed to alone."""
    total = 0
    for path, shape in matrix_shapes(model).items():
        if adapter.adapts(path):
            size = sum(map(math.prod, factor_shapes(shape, adapter.rank_alpha(path)[0])))
            total += size * model.moe.n_active // model.moe.n_experts if active and len(shape) == 3 else size
    return total


def tuning_flops_per_token(run: TuneRun) -> float:
    """Model FLOPs per token of one step, without recomputation: PaLM's count (jaxlm.count) less what is frozen.

    A frozen matrix has no gradient of its own: 4 FLOPs per parameter in the place of 6; factors have 6. The formed
    weights of adapted experts are left out: they cost by the expert, not by the token.
    """
    whole, adapter = flops_per_token(run.model, run.train.seq_len), run.tune.adapter
    if adapter is None:
        return whole
    return whole - 2.0 * matmul_param_count(run.model) + 6.0 * factor_count(run.model, adapter, active=True)


def tuned_memory(run: TuneRun) -> Memory:
    """Memory per device of one step: `estimate.memory`, where there is an adapter with the base counted as frozen.

    weights: the base as it lies, and the factors' masters. copies: of the factors, and one dequantised weight.
    """
    adapter = run.tune.adapter
    if adapter is None:
        return memory(run)
    one, model, fused = shares(run), run.model, fuses_attention(run)
    count = factor_count(model, adapter)
    base, largest = _base_bytes(run)
    masters, moments = count * one.master / one.store, moment_bytes(run, count) / one.store
    copies = count * one.item / one.store + largest * (4 + one.item)
    layers = [layer_activations(run, i, fused) for i in range(model.n_layers)]
    kept = [kept_activations(run, i, fused) + _kept_products(run, adapter, i) for i in range(model.n_layers)]
    last, stream = model.n_layers - 1, one.tokens * model.d_model * one.item
    top = sum(kept[:-1]) + max(layers[-1], kept[-1]) + layer_backward(run, last)
    logits = chunk_bytes(run, head=False)
    # One mask of packed examples serves all layers, forward and backward, in half precision as cuDNN reads it.
    masks = 2 * one.rows * run.train.seq_len**2 if fused and run.tune.chat.packing else 0
    gradients = count * one.master / one.store * (2 if run.train.accumulation > 1 else 1)
    backward = copies + max(top + 3 * stream, sum(kept) + logits + 3 * stream) + gradients + masks
    update = gradients + copies
    peak = base + masters + moments + max(backward, update)
    return Memory(base + masters, moments, gradients, copies, sum(kept), logits, backward, update, peak)


def _kept_products(run: TuneRun, adapter: AdapterConfig, layer: int) -> float:
    """Under remat dots every product is kept: of an adapted projection also x a and what b makes of it."""
    if run.train.remat != "dots":
        return 0.0
    one = shares(run)
    return float(
        sum(
            one.tokens * one.item * (shape[-1] + adapter.rank_alpha(path)[0])
            for path, shape in matrix_shapes(run.model).items()
            if path.startswith(f"blocks.{layer}.") and len(shape) == 2 and adapter.adapts(path)
        )
    )


def _base_bytes(run: TuneRun) -> tuple[float, int]:
    """Bytes of the frozen base on one device, and parameters of the largest matrix that is dequantised, 0 for none."""
    one, total = shares(run), param_count(run.model)
    if run.tune.quant == "none":
        return total * one.item / one.store, 0
    quantised = {
        path: math.prod(shape)
        for path, shape in matrix_shapes(run.model).items()
        if path != "lm_head.weight" and ".router." not in path and ".shared_gate." not in path
    }
    inside = sum(quantised.values())
    return (total - inside) * one.item + inside * BITS[run.tune.quant] / 8, max(quantised.values())


def tuned_budget(run: TuneRun, on: Device, mfu: float, tokens: int) -> Budget:
    """`estimate.budget` with the FLOPs and the checkpoints of an adapter. Raises ConfigError likewise."""
    whole, adapter = budget(run, on, mfu, tokens), run.tune.adapter
    if adapter is None:
        return whole
    each, count = tuning_flops_per_token(run), factor_count(run.model, adapter)
    faster = whole.flops_per_token / each
    checkpoint = count * SIZES[run.train.param_dtype] + moment_bytes(run, count)
    return whole._replace(
        flops_per_token=each,
        tokens_per_second=whole.tokens_per_second and whole.tokens_per_second * faster,
        hours=whole.hours and whole.hours / faster,
        checkpoint=checkpoint,
        disk=checkpoint * (run.train.keep + 1),
    )
