"""What a training run will need, by arithmetic alone: memory per device, time, tokens, disk. No framework is loaded.

The terms of memory are those that XLA's buffer assignment for a GPU shows to be alive when most is; each function says
which. `jaxlm.plan` compiles the same step for the device and says what the compiler itself finds.
"""

from typing import NamedTuple

from jaxlm.config import ConfigError, ModelConfig, RunConfig, nearest
from jaxlm.count import active_param_count, flops_per_token, param_count

# Of a chunk of the loss at most, and what its vocabulary is a multiple of, as in jaxlm.head_loss.
CHUNK_TOKENS, CHUNK_BYTES, LANES = 2**14, 2**32, 128
# Queries of a block at least, and blocks of a sequence, as in jaxlm.causal_attention.
LEAST_BLOCK, MOST_BLOCKS = 128, 4
# Rows of a tile of one expert, as in jaxlm.grouped; in full precision the second, and so many tiles of a product.
KERNEL_TILES, GPU_TILES, GPU_CHUNK = (128, 64, 32, 16), (256, 64, 16), 16
TOKENS_PER_PARAM = 20  # arXiv:2203.15556, table 3: tokens over parameters at the optimum, 20 for all sizes
USABLE = 0.95  # share of a device's memory that a program gets: CUDA, cuDNN and NCCL keep the rest
# Bytes of one number.
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK8 = 256  # values that share one float32 scale in 8-bit moments


class Device(NamedTuple):
    """Memory in bytes and dense bfloat16 peak in FLOP/s, by the maker's data sheet."""

    memory: float
    peak: float
    source: str


DEVICES: dict[str, Device] = {
    "h200": Device(141e9, 989.4e12, "NVIDIA H200 data sheet, SXM"),
    "h100": Device(80e9, 989.4e12, "NVIDIA H100 data sheet, SXM"),
    "h100-pcie": Device(80e9, 756e12, "NVIDIA H100 data sheet, PCIe"),
    "b200": Device(180e9, 2250e12, "NVIDIA DGX B200 data sheet, one of eight"),
    "a100-80": Device(80e9, 312e12, "NVIDIA A100 data sheet"),
    "a100-40": Device(40e9, 312e12, "NVIDIA A100 data sheet"),
    "l40s": Device(48e9, 362e12, "NVIDIA L40S data sheet, without sparsity"),
    "l4": Device(24e9, 121e12, "NVIDIA L4 data sheet, without sparsity"),
    "rtx4090": Device(24e9, 165.2e12, "NVIDIA Ada GPU architecture white paper, float32 accumulation"),
}


def device(name: str) -> Device:
    """The device called `name`. Raises ConfigError that names the nearest."""
    if name.lower() not in DEVICES:
        raise ConfigError(
            f"unknown device {name!r}{nearest(name, DEVICES)}; devices are {', '.join(DEVICES)}"
        )
    return DEVICES[name.lower()]


class Memory(NamedTuple):
    """Bytes of one device. `peak` = weights + moments + the larger of the two moments of a step below."""

    weights: float  # masters
    moments: float  # the optimizer's
    gradients: float  # of all parameters, as they are when the optimizer runs
    copies: float  # weights in the dtype of the computation, gathered where they are stored split
    activations: float  # kept between the passes, all layers
    logits: float  # of one chunk of the loss, with their gradient, and the sum of the head's
    backward: float  # alive when the last block's gradient is taken: copies, activations, what that takes
    update: float  # alive when the optimizer runs: gradients, and copies still there
    peak: float

    @property
    def state(self) -> float:
        """What stays from step to step."""
        return self.weights + self.moments


class Shares(NamedTuple):
    """How one device's part of a micro-batch looks."""

    rows: int  # sequences
    tokens: int
    group: int  # tokens that its experts see
    store: int  # parts a parameter is stored in
    item: int  # bytes of the computation's dtype
    wide: int  # of what is upcast
    master: int  # of the masters


def shares(run: RunConfig) -> Shares:
    """The part of one device."""
    mesh, train = run.mesh, run.train
    rows = train.batch_size // train.accumulation // (mesh.data * mesh.fsdp * mesh.expert)
    item = SIZES[train.dtype]
    tokens = rows * train.seq_len
    store = mesh.fsdp * mesh.expert * mesh.tensor
    return Shares(rows, tokens, tokens * mesh.expert, store, item, max(4, item), SIZES[train.param_dtype])


def memory(run: RunConfig, fused_attention: bool | None = None) -> Memory:
    """Memory per device of one training step.

    fused_attention: whether scores stay inside cuDNN's kernel; None = as `jaxlm.plan` compiles it.
    """
    one, model = shares(run), run.model
    fused = fuses_attention(run) if fused_attention is None else fused_attention
    total = param_count(model)
    weights, moments = total * one.master / one.store, moment_bytes(run, total) / one.store
    layers = [layer_activations(run, i, fused) for i in range(model.n_layers)]
    kept = [kept_activations(run, i, fused) for i in range(model.n_layers)]
    copies = _copies(run)
    logits, head = chunk_bytes(run), model.vocab_size * model.d_model * one.item
    last = model.n_layers - 1
    stream = one.tokens * model.d_model * one.item
    # When the last block's gradient is taken: what all blocks keep, all of the last one, its transients, the gradients
    # of the head (whole, before they are split) and of the embedding, and the stream with its gradients.
    top = sum(kept[:-1]) + max(layers[-1], kept[-1]) + layer_backward(run, last)
    split_head = head / one.store if one.store > 1 else head
    backward = copies + top + 3 * stream + 2 * split_head
    # In the loss: the head's weights, a chunk's logits, the sum of the head's gradient, hidden states, in chunks, and
    # their gradient.
    loss = copies + sum(kept) + logits + head + 3 * stream
    gradients = total * (one.item if run.train.accumulation == 1 else one.master) / one.store
    accumulated = total * one.master / one.store if run.train.accumulation > 1 else 0.0
    # When the first block's gradient is taken: the gradients of all others.
    first = total * one.item / one.store + max(layers[0], kept[0]) + layer_backward(run, 0)
    update = max(gradients, first if model.n_layers > 1 else 0.0) + accumulated
    # One mask of packed documents serves all layers, forward and backward, in half precision as cuDNN reads it.
    masks = 2 * one.rows * run.train.seq_len**2 if fused and run.data.packing else 0
    backward = max(backward, loss) + accumulated + masks
    peak = weights + moments + max(backward, update)
    return Memory(weights, moments, gradients, copies, sum(kept), logits, backward, update, peak)


def fuses_attention(run: RunConfig) -> bool:
    """Whether cuDNN's kernel serves this run: half precision, a head it takes, no dropout on scores, no bias table."""
    half, head = run.train.dtype in ("bfloat16", "float16"), run.model.head_dim
    return half and head % 8 == 0 and head <= 256 and not run.model.dropout and not run.model.attn_bias_table


def moment_bytes(run: RunConfig, total: int) -> float:
    """AdamW keeps two moments, Muon one of matrices (embeddings and head stay with AdamW)."""
    size = {"same": SIZES[run.train.param_dtype], "bfloat16": 2}[run.optim.moment_dtype]
    if run.optim.optimizer == "adamw8bit":
        return total * 2 * (1 + 4 / _BLOCK8)
    if run.optim.optimizer == "muon":
        outside = run.model.vocab_size * run.model.d_model * (1 if run.model.tied else 2)
        return float((2 * outside + (total - outside)) * size)
    return float(total * 2 * size)


def _experts(model: ModelConfig) -> int:
    """Parameters of all routed experts."""
    layers = sum(model.is_moe(i) for i in range(model.n_layers))
    width = (3 if model.mlp == "swiglu" else 2) * model.expert_d_ff
    return layers * model.moe.n_experts * model.d_model * width


def _copies(run: RunConfig) -> float:
    """Weights as products read them: in the computation's dtype, gathered over what they are stored split along.

    Without remat they live from a block's forward to its backward pass. With it each block gathers again, and what
    lives is the split copy and one block's whole.
    """
    one, mesh, model = shares(run), run.mesh, run.model
    outside = model.vocab_size * model.d_model * (1 if model.tied else 2)
    experts = _experts(model)
    dense = param_count(model) - experts - outside
    split = (dense + experts) * one.item / one.store if one.item != one.master else 0.0
    if one.store == 1:
        return split
    whole = (dense / mesh.tensor + experts / (mesh.expert * mesh.tensor)) * one.item
    if run.train.remat == "none":
        return whole
    return split + whole / model.n_layers


def layer_activations(run: RunConfig, layer: int, fused: bool) -> float:
    """Bytes that block `layer` keeps for its backward pass without remat.

    Per token: the stream before attention and before the MLP, both norms' outputs, q, k, v, heads, a float32 per head
    (softmax sums), and of a dense MLP gate, up and their product. Unfused attention keeps its probabilities, with
    dropout or a bias table its scores too, upcast; dropout keeps its masks, a byte per element.
    """
    one, model, mesh = shares(run), run.model, run.mesh
    heads, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    stream = 4 + (one.item == one.wide)  # in full precision a norm keeps its input normed as well
    size = one.tokens * one.item * (stream * model.d_model + (2 * heads + 2 * kv) / mesh.tensor)
    if fused:
        size += one.tokens * 4 * model.n_heads / mesh.tensor
    elif _in_blocks(run):
        size += _scores(run) * causal_share(run.train.seq_len) * one.item
    else:
        size += _scores(run) * (one.wide + one.item + (model.dropout > 0))
    return size + _mlp_activations(run, layer)


def _scores(run: RunConfig) -> float:
    """How many there are of one layer on one device."""
    return shares(run).rows * run.model.n_heads * run.train.seq_len**2 / run.mesh.tensor


def _in_blocks(run: RunConfig) -> bool:
    """Whether unfused attention skips what causality forbids, as in jaxlm.causal_attention."""
    return not run.model.dropout and not run.model.attn_bias_table


def causal_share(length: int) -> float:
    """Share of the scores that attention in blocks of queries makes, each with all keys up to its last query's."""
    block = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))
    ends = [min(start + block, length) for start in range(0, length, block)]
    return sum((end - start) * end for start, end in zip((0, *ends), ends)) / length**2


def _mlp_activations(run: RunConfig, layer: int) -> float:
    one, model, mesh = shares(run), run.model, run.mesh
    gated = model.mlp == "swiglu"
    if not model.is_moe(layer):
        return _dense_activations(run, model.d_ff)
    moe = model.moe
    hidden = (2 if gated else 1) * model.expert_d_ff / mesh.tensor
    size = slots(run) * (hidden * one.item + 5) + 2 * one.tokens * moe.n_experts * one.wide
    if mesh.expert > 1:
        size += one.group * model.d_model * one.item  # tokens gathered from the other devices
    return size + (_dense_activations(run, moe.shared_d_ff) if moe.shared_d_ff else 0.0)


def _dense_activations(run: RunConfig, d_ff: int) -> float:
    one, model = shares(run), run.model
    arrays = 3 if model.mlp == "swiglu" else 2
    return one.tokens * d_ff / run.mesh.tensor * (arrays * one.item + (model.dropout > 0))


def slots(run: RunConfig) -> int:
    """Rows of the experts' buffers on one device, sized for the worst routing: all assignments, and a tile each."""
    one, moe = shares(run), run.model.moe
    assignments, experts = one.group * moe.n_active, moe.n_experts // run.mesh.expert
    if one.item == 2:
        tile = next((t for t in KERNEL_TILES if t <= assignments // experts), KERNEL_TILES[-1])
    else:
        tile = next((t for t in GPU_TILES if t * experts <= 4 * assignments), 1)
    return assignments + min(experts, assignments) * (tile - 1)


def kept_activations(run: RunConfig, layer: int, fused: bool) -> float:
    """Bytes that block `layer` keeps under the run's remat policy.

    block: its input and, with experts, the routing. dots: also q, k, v, heads with their sums, the attention's
    output, gate and up, or the experts' hidden layer.
    """
    one, model, mesh = shares(run), run.model, run.mesh
    if run.train.remat == "none":
        return layer_activations(run, layer, fused)
    routing = one.tokens * model.moe.n_active * 4 if model.is_moe(layer) else 0
    size = float(one.tokens * model.d_model * one.item + routing)
    if run.train.remat == "block":
        return size
    heads, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    size += one.tokens * one.item * ((heads + 2 * kv) / mesh.tensor + model.d_model)
    if fused:
        size += one.tokens * (one.item * heads + 4 * model.n_heads) / mesh.tensor
    gated = model.mlp == "swiglu"
    dense = model.moe.shared_d_ff if model.is_moe(layer) else model.d_ff
    size += one.tokens * dense / mesh.tensor * (2 if gated else 1) * one.item
    if model.is_moe(layer):
        hidden = (2 if gated else 1) * model.expert_d_ff / mesh.tensor
        size += slots(run) * (hidden * one.item + 5) + one.tokens * model.moe.n_experts * one.wide
    return size


def layer_backward(run: RunConfig, layer: int) -> float:
    """What the gradient of one block takes beside its activations.

    Dense: gradients of gate and up, less their product, which is done with. Experts: gradients of all local weights,
    and of the rows between the products; in full precision the weights' twice in float32 (the sum so far, and the
    next) and a chunk of tiles' share of the larger of them. Unfused attention: the gradient of the scores.
    """
    one, model, mesh = shares(run), run.model, run.mesh
    if not model.is_moe(layer):
        size = one.tokens * model.d_ff / mesh.tensor * one.item
    else:
        hidden = model.expert_d_ff / mesh.tensor
        matrix, halves = model.d_model * hidden, 2 if model.mlp == "swiglu" else 1
        weights = model.moe.n_experts // mesh.expert * (halves + 1) * matrix
        size = slots(run) * one.item * (2 * model.d_model + (halves + 1) * hidden)
        if one.item == 2:
            size += weights * one.item
        else:
            size += weights * one.wide * 2 + GPU_CHUNK * halves * matrix * one.wide
    if not fuses_attention(run):
        size = max(size, _scores(run) * one.wide / (MOST_BLOCKS if _in_blocks(run) else 1))
    return size


def chunk_bytes(run: RunConfig, head: bool = True) -> float:
    """One chunk in the computation's dtype and its gradient; the sum of the head's gradient over chunks, upcast.

    A single chunk adds nothing up, and its gradient takes the place of the logits. head: whether the head is trained.
    """
    one, V = shares(run), run.model.vocab_size
    fitting = CHUNK_BYTES // (one.item * V)
    tokens = -(-one.tokens // run.mesh.tensor)
    chunks = -(-tokens // min(CHUNK_TOKENS, 2 ** max(0, fitting.bit_length() - 1)))
    if chunks == 1:
        return float(tokens * V * one.item)
    columns = V + -V % LANES
    return float(
        2 * -(-tokens // chunks) * columns * one.item + head * run.model.d_model * columns * one.wide
    )


class Budget(NamedTuple):
    """Time, tokens and disk of a run; rates over all devices."""

    flops_per_token: float  # forward and backward, causal
    tokens_per_step: int
    tokens_per_second: float | None  # None where the device's peak in this dtype is not known
    hours: float | None
    optimal_tokens: float  # 20 per active parameter
    checkpoint: float  # bytes of one
    disk: float  # of those kept: the newest, and the best


def budget(run: RunConfig, on: Device, mfu: float, tokens: int) -> Budget:
    """Budget of `tokens` tokens at a model FLOP utilisation in (0, 1]. Raises ConfigError outside of it.

    Tokens at the optimum by arXiv:2203.15556, on active parameters where experts are sparse: the paper trained dense
    models, and a token costs what is active. Peaks of the table hold for half precision alone.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu={mfu} must be above 0 and at most 1, for example 0.4")
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be positive")
    each = flops_per_token(run.model, run.train.seq_len)
    half = run.train.dtype in ("bfloat16", "float16")
    rate = on.peak * mfu * run.mesh.size / each if half else None
    total = param_count(run.model)
    checkpoint = total * SIZES[run.train.param_dtype] + moment_bytes(run, total)
    return Budget(
        each,
        run.train.batch_size * run.train.seq_len,
        rate,
        None if rate is None else tokens / rate / 3600,
        float(TOKENS_PER_PARAM * active_param_count(run.model)),
        checkpoint,
        checkpoint * (run.train.keep + 1),
    )


def expected_collectives(run: RunConfig) -> dict[str, str]:
    """What a mesh makes devices exchange: kind of collective -> what for. A step has no other kind."""
    mesh = run.mesh
    found: dict[str, list[str]] = {}

    def add(kind: str, reason: str) -> None:
        found.setdefault(kind, []).append(reason)

    if mesh.size > 1:
        add("all-reduce", "sums of the loss and of norms")
    if mesh.data > 1:
        add("all-reduce", "gradients of copies")
    if mesh.size > mesh.data:
        add("all-gather", "weights, before they are used")
        add("reduce-scatter", "their gradients")
    if mesh.fsdp * mesh.expert > 1:
        add("all-to-all", "rows of the embedding, whose columns are split")
    if mesh.expert > 1:
        add("all-gather", "tokens, to the experts")
        add("reduce-scatter", "what the experts made")
    if mesh.tensor > 1:
        add("all-reduce", "outputs of heads and hidden layers")
        add("all-gather", "tokens, after the loss")
        add("all-to-all", "columns of weights, between storage and use")
        add("collective-permute", "columns of weights, between storage and use")
    return {kind: "; ".join(reasons) for kind, reasons in found.items()}
