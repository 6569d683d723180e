"""Parameters and FLOPs of a config by arithmetic alone: nothing is built and no framework is loaded."""

import os

from jaxlm.config import ConfigError, ModelConfig


def param_count(model: ModelConfig) -> int:
    """All parameters; a tied head is counted once, with the embedding."""
    return sum(_block(model, layer, model.moe.n_experts) for layer in range(model.n_layers)) + _outside(model)


def active_param_count(model: ModelConfig) -> int:
    """Parameters one token's forward pass uses: `param_count` less the experts it is not routed to.

    Embedding and head count in full, as model cards do.
    """
    return sum(_block(model, layer, model.moe.n_active) for layer in range(model.n_layers)) + _outside(model)


def require_memory(model: ModelConfig, bytes_per_param: int, advice: str) -> None:
    """Raises ConfigError where so many bytes a parameter are more than this machine has; `advice`: the way out."""
    needed = bytes_per_param * param_count(model)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise ConfigError(
            f"to compare {param_count(model):,} parameters takes about {needed / 2**30:,.0f} GiB and this machine has "
            f"{available / 2**30:,.0f}; {advice}"
        )


def flops_per_token(model: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Model FLOPs per token of one training step, forward and backward, without recomputation.

    PaLM's count (arXiv:2204.02311, appendix B): 6 per active matmul parameter (attention projections, MLP or
    active experts, router, head; the embedding is a lookup and biases and norms are not matmuls) and 12 N H
    per layer and position looked at, for scores and weighted values. PaLM counts all `seq_len` positions;
    `causal` counts the half that the mask leaves, and a window what it leaves of that. Capacity limits are
    not discounted.

    Args:
        model: the decoder.
        seq_len: T, tokens per sequence.
        causal: count only what the causal mask leaves.
    """
    seen = sum(_mean_positions(seq_len, model.window(layer), causal) for layer in range(model.n_layers))
    return 6.0 * matmul_param_count(model) + 12.0 * model.n_heads * model.head_dim * seen


def matmul_param_count(model: ModelConfig) -> int:
    """Parameters that one token is multiplied with: projections, MLP or active experts, router and head."""
    layers = range(model.n_layers)
    inside = sum(_attention_weights(model) + _mlp_weights(model, layer) for layer in layers)
    return inside + model.d_model * model.vocab_size


def _mean_positions(seq_len: int, window: int, causal: bool) -> float:
    """Positions one query looks at on average: the area under the mask over T, its diagonal counted as half."""
    span = min(window or seq_len, seq_len)
    return span - span * span / (2 * seq_len) if causal else float(span)


def _outside(model: ModelConfig) -> int:
    """Parameters outside the blocks: embedding, learned positions, final norm and head."""
    table = model.vocab_size * model.d_model
    positions = model.context * model.d_model if model.position == "learned" else 0
    head = 0 if model.tied else table
    return table + positions + model.d_model + head + model.head_bias * model.vocab_size


def _block(model: ModelConfig, layer: int, experts: int) -> int:
    """Parameters of one block, counting `experts` experts where it is a mixture."""
    norms = 2 * model.d_model
    return norms + _attention(model) + (_moe(model, experts) if model.is_moe(layer) else _dense(model))


def _attention_weights(model: ModelConfig) -> int:
    return 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads)


def _attention(model: ModelConfig) -> int:
    heads, kv_heads, head_dim = model.n_heads, model.n_kv_heads, model.head_dim
    biases = model.qkv_bias * (heads + 2 * kv_heads) * head_dim + model.attn_out_bias * model.d_model
    extras = model.qk_norm * 2 * head_dim + model.attn_bias_table * heads * model.context**2
    return _attention_weights(model) + biases + extras


def _in_width(model: ModelConfig, d_ff: int) -> int:
    """Columns that go into one MLP's hidden layer: gate and up for SwiGLU, up alone for GELU."""
    return 2 * d_ff if model.mlp == "swiglu" else d_ff


def _mlp(model: ModelConfig, d_ff: int, bias: bool) -> int:
    """One MLP or expert: [D, in_width] and [d_ff, D], with one bias per output column."""
    into = _in_width(model, d_ff)
    return model.d_model * (into + d_ff) + bias * (into + model.d_model)


def _dense(model: ModelConfig) -> int:
    return _mlp(model, model.d_ff, model.mlp_bias)


def _moe(model: ModelConfig, experts: int) -> int:
    moe = model.moe
    router = model.d_model * moe.n_experts
    shared = _mlp(model, moe.shared_d_ff, model.mlp_bias) if moe.shared_d_ff else 0
    shared += moe.shared_gate * model.d_model
    return router + experts * _mlp(model, model.expert_d_ff, moe.expert_bias) + shared


def _mlp_weights(model: ModelConfig, layer: int) -> int:
    """Active matmul parameters of block `layer` after its attention."""
    if not model.is_moe(layer):
        return _mlp(model, model.d_ff, bias=False)
    moe = model.moe
    shared = _mlp(model, moe.shared_d_ff, bias=False) if moe.shared_d_ff else 0
    routed = moe.n_active * _mlp(model, model.expert_d_ff, bias=False)
    return model.d_model * (moe.n_experts + moe.shared_gate) + routed + shared
