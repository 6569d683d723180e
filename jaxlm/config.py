"""Everything a run can be told, as frozen dataclasses: no jax, no torch, JSON in and out.

The trailing comment of a field is its help text on the command line. Combinations that cannot work are
refused here, with both numbers in the message, before anything is built or written.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from jaxlm.json_file import read_object

C = TypeVar("C")
_LARGEST = 2**31  # of a size; no array has a longer axis


class InputError(ValueError):
    """Bad input of any kind: the message says what was wrong and what to do; entry points exit with 2."""


class ConfigError(InputError):
    """A configuration that cannot work; the message is one line that says what to change."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _require_finite(config: Any, prefix: str = "") -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        require(
            not isinstance(value, float) or math.isfinite(value), f"{prefix}{f.name}={value} must be finite"
        )


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length the model was first trained for."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"  # formula; sources in jaxlm/rope_table.py
    factor: float = 1.0  # stretch of the context (linear, llama3, yarn)
    original_context: int = 0  # positions the unscaled model was trained for (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3: wavelengths over original_context/this are stretched fully
    high_freq_factor: float = 4.0  # llama3: wavelengths under original_context/this are left alone
    beta_fast: float = 32.0  # yarn: rotations over original_context above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is stretched fully
    attention_factor: float = 0.0  # yarn: multiplier of cos and sin; 0 = 0.1 ln(factor) + 1 (the paper's)

    def __post_init__(self) -> None:
        _require_finite(self, "rope_scaling.")
        require(self.factor > 0, f"rope_scaling.factor={self.factor} must be positive")
        if self.kind == "none":
            require(self.factor == 1.0, f"rope_scaling.factor={self.factor} has no effect with kind='none'")
        if self.kind in ("llama3", "yarn"):
            require(
                self.original_context > 0,
                f"rope_scaling.original_context={self.original_context} must be > 0 for kind={self.kind!r}",
            )
        if self.kind == "llama3":
            require(
                0 < self.low_freq_factor < self.high_freq_factor,
                f"rope_scaling.low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}",
            )
        if self.kind == "yarn":
            require(
                0 < self.beta_slow < self.beta_fast,
                f"rope_scaling.beta_slow={self.beta_slow} must be in (0, beta_fast={self.beta_fast})",
            )
            require(
                self.attention_factor >= 0,
                f"rope_scaling.attention_factor={self.attention_factor} must not be negative (0 = automatic)",
            )


BalanceReduction = Literal["none", "mixtral", "layer_mean", "layer_sum", "megatron", "levanter", "maxtext"]


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts; n_experts = 0 makes every layer dense."""

    n_experts: int = 0  # E; 0 = dense model
    n_active: int = 2  # A, experts per token
    d_ff: int = 0  # F of one expert; 0 = the model's d_ff
    pattern: tuple[bool, ...] = (True,)  # layer i is MoE if pattern[i mod len]; the rest are dense
    renormalize: bool = True  # make the A chosen router probabilities sum to one
    capacity_factor: float = 0.0  # 0 = dropless; else experts keep int(this * tokens / E) in training
    balance: BalanceReduction = "mixtral"  # reduction of the balance loss; formulas in jaxlm/moe.py
    balance_coef: float = 0.01  # weight of the balance loss
    router_z_coef: float = 0.0  # weight of mean(logsumexp(router logits)^2), summed over layers
    expert_bias: bool = False  # biases in the experts
    shared_d_ff: int = 0  # width of a shared expert that sees every token; 0 = none
    shared_gate: bool = False  # multiply the shared expert by sigmoid(x w)

    def __post_init__(self) -> None:
        _require_finite(self, "moe.")
        for name in ("n_experts", "d_ff", "shared_d_ff"):
            value = getattr(self, name)
            require(0 <= value < _LARGEST, f"moe.{name}={value} must not be negative, and below 2^31")
        if self.n_experts == 0:
            return
        require(
            1 <= self.n_active <= self.n_experts,
            f"moe.n_active={self.n_active} must be between 1 and n_experts={self.n_experts}",
        )
        require(len(self.pattern) > 0, "moe.pattern is empty; it needs at least one of True, False")
        require(
            any(self.pattern), f"moe.pattern={self.pattern} has no MoE layer but n_experts={self.n_experts}"
        )
        require(self.capacity_factor >= 0, f"moe.capacity_factor={self.capacity_factor} must not be negative")
        require(self.balance_coef >= 0, f"moe.balance_coef={self.balance_coef} must not be negative")
        require(self.router_z_coef >= 0, f"moe.router_z_coef={self.router_z_coef} must not be negative")
        require(
            not (self.shared_gate and self.shared_d_ff == 0),
            f"moe.shared_gate={self.shared_gate} needs a shared expert, but shared_d_ff={self.shared_d_ff}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. What shapes or numbers depend on has no default; options are off unless named."""

    vocab_size: int  # V
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # N, query heads
    n_kv_heads: int  # K, key and value heads; N = MHA, 1 = MQA, between = GQA
    head_dim: int  # H, independent of D/N
    d_ff: int  # F of a dense MLP
    context: int  # longest sequence
    rope_theta: float  # base of the rotary frequencies (position='rope')
    norm_eps: float  # inside the square root of RMSNorm
    position: Literal["rope", "learned"] = "rope"  # rotary, or a learned table added to the embedding
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # stretched rotary frequencies
    mlp: Literal["swiglu", "gelu_erf", "gelu_tanh"] = "swiglu"  # dense MLPs and experts alike
    qkv_bias: bool = False  # biases on the q, k and v projections
    attn_out_bias: bool = False  # bias on the attention output projection
    mlp_bias: bool = False  # biases in dense MLPs
    head_bias: bool = False  # bias on the logits
    attn_bias_table: bool = False  # learned [1, N, context, context] added to the scores (gptoss-original)
    qk_norm: bool = False  # RMSNorm over H on q and k, before RoPE
    tied: bool = False  # head = embedding transposed
    windows: tuple[int, ...] = (0,)  # layer i sees the last windows[i mod len] positions; 0 = all
    dropout: float = 0.0  # on embeddings, attention probabilities and the MLP's hidden layer
    init: Literal["normal", "fan_in"] = "normal"  # std init_std, outputs / sqrt(2L); or 1/sqrt(fan_in)
    init_std: float = 0.02  # standard deviation under init='normal'
    moe: MoEConfig = field(default_factory=MoEConfig)  # mixture of experts

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "context",
        ):
            value = getattr(self, name)
            require(0 < value < _LARGEST, f"{name}={value} must be positive and below 2^31")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}",
        )
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        require(self.init_std > 0, f"init_std={self.init_std} must be positive")
        if self.position == "rope":
            require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for position='rope'")
            require(self.rope_theta > 0, f"rope_theta={self.rope_theta} must be positive")
            require(
                self.rope_theta > 1 or self.rope_scaling.kind != "yarn",
                f"rope_theta={self.rope_theta} must exceed 1 for rope_scaling.kind={self.rope_scaling.kind!r}",
            )
        else:
            require(
                self.rope_scaling.kind == "none",
                f"rope_scaling.kind={self.rope_scaling.kind!r} has no effect with position={self.position!r}",
            )
        require(len(self.windows) > 0, "windows is empty; use 0 for full attention")
        require(min(self.windows) >= 0, f"windows={self.windows} must not be negative; 0 = full attention")

    @property
    def expert_d_ff(self) -> int:
        """F of one expert."""
        return self.moe.d_ff or self.d_ff

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` holds experts instead of a dense MLP."""
        return self.moe.n_experts > 0 and self.moe.pattern[layer % len(self.moe.pattern)]

    def window(self, layer: int) -> int:
        """Positions block `layer` sees, itself included; 0 = all."""
        return self.windows[layer % len(self.windows)]


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    path: str = ""  # text, jsonl, parquet: file, folder, glob; or prepared data; '' = Python's library
    mixture: tuple[str, ...] = ()  # FOLDER=WEIGHT of prepared data, instead of path; the weights sum to 1
    column: str = "text"  # key of the text in jsonl and parquet
    tokenizer: str = "train"  # train = BPE on the corpus; a tokenizer.json or .tiktoken; gpt2, cl100k_base, …
    val_fraction: float = 0.05  # documents held out (sources under 20 documents: last share of tokens)
    cache: str = ""  # folder of the tokenised shards; '' = inside the run directory
    shuffle: bool = True  # shuffled windows; False = corpus order
    stride: int = 0  # tokens from one window's start to the next; 0 = seq_len, no overlap
    packing: bool = False  # documents of a window do not see each other, and positions restart with each
    verify: Literal["quick", "full"] = "quick"  # at start: size, time, a sample of shards; or every byte

    def __post_init__(self) -> None:
        require(0 < self.val_fraction < 1, f"data.val_fraction={self.val_fraction} must be between 0 and 1")
        require(0 <= self.stride < _LARGEST, f"data.stride={self.stride} must not be negative")
        require(
            not (self.path and self.mixture),
            f"data.path={self.path!r} and data.mixture={self.mixture} exclude each other; give one",
        )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, its schedule and what is added to the loss."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 3e-4  # peak learning rate
    min_lr: float = 3e-5  # learning rate at the end of the decay
    warmup_steps: int = 100  # linear warmup: step s (from 0) has lr (s+1)/warmup_steps
    decay_steps: int = 0  # steps until min_lr; 0 = train.steps of the first start
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # learning rate after the warmup
    wsd_decay: float = 0.2  # wsd (warmup-stable-decay): share of decay_steps in the closing decay
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    moment_dtype: Literal["same", "bfloat16"] = "same"  # of moments and momentum; same = that of the weights
    muon_momentum: float = 0.95  # muon: decay of the momentum
    muon_nesterov: bool = True  # muon: look one step ahead
    muon_steps: int = 5  # muon: Newton-Schulz iterations
    muon_scale: Literal["match_rms", "original"] = "match_rms"  # muon: match_rms fits AdamW's lr
    weight_decay: float = 0.1  # decoupled, times the learning rate
    decay: Literal["matrices", "matrices_and_embeddings"] = "matrices"  # never norms and biases
    policy: tuple[str, ...] = ()  # REGEX:KEY=VALUE[,…] by parameter path; keys lr, decay (factors), optimizer
    clip_norm: float = 1.0  # largest gradient norm; 0 = no clipping
    z_loss_coef: float = 0.0  # weight of mean(logsumexp(logits)^2)

    def __post_init__(self) -> None:
        _require_finite(self, "optim.")
        require(self.lr > 0, f"optim.lr={self.lr} must be positive")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr={self.min_lr} must be between 0 and lr={self.lr}")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optim.b1={self.b1}, b2={self.b2} must be in [0, 1)")
        momentum = self.muon_momentum
        require(0 <= momentum < 1, f"optim.muon_momentum={momentum} must be in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be positive")
        # Of eight bits, rounding takes up to 2^-8 of a value: what shrinks by less never shrinks.
        slowest = max(self.b1, self.b2, momentum)
        require(
            self.moment_dtype == "same" or 1 - slowest >= 2**-8,
            f"optim.b1={self.b1}, b2={self.b2}, muon_momentum={momentum} must not exceed {1 - 2**-8} with "
            f"moment_dtype={self.moment_dtype!r}, whose rounding would hold moments still",
        )
        require(0 < self.wsd_decay <= 1, f"optim.wsd_decay={self.wsd_decay} must be in (0, 1]")
        require(self.muon_steps > 0, f"optim.muon_steps={self.muon_steps} must be positive")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "z_loss_coef"):
            require(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")
        if self.schedule != "constant" and self.decay_steps:
            require(
                self.warmup_steps <= self.decay_steps,
                f"optim.warmup_steps={self.warmup_steps} must not exceed decay_steps={self.decay_steps}",
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; `fsdp=4,expert=2` on the command line. The batch is split over all but tensor."""

    data: int = 1  # copies of the model, each with its own share of the batch
    fsdp: int = 1  # batch and parameters split together
    tensor: int = 1  # heads, ffn and vocabulary split
    expert: int = 1  # experts split

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            require(size >= 1, f"mesh axis {name}={size} must be at least 1")

    @property
    def size(self) -> int:
        """Devices the mesh needs."""
        return self.data * self.fsdp * self.tensor * self.expert

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """`fsdp=4,expert=2` -> MeshConfig(fsdp=4, expert=2). Raises ConfigError on anything else."""
        sizes: dict[str, int] = {}
        names = [f.name for f in dataclasses.fields(cls)]
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, _, size = part.partition("=")
            require(name in names, f"mesh axis {name!r} in {text!r} is unknown; axes are {', '.join(names)}")
            require(name not in sizes, f"mesh axis {name!r} stands twice in {text!r}")
            require(
                re.fullmatch("[0-9]{1,9}", size) is not None,
                f"mesh {text!r}: {part!r} is not of the form axis=count",
            )
            sizes[name] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v > 1) or "data=1"


Dtype = Literal["float32", "bfloat16", "float16", "float64"]
ParamDtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how much, how often, in which precision."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # sequences per optimizer step, over all devices
    seq_len: int = 256  # T, tokens per sequence
    accumulation: int = 1  # micro-batches an optimizer step is split into
    dtype: Dtype = "float32"  # of the computation; float16 scales the loss dynamically
    param_dtype: ParamDtype = "float32"  # of the master weights and moments
    remat: Literal["none", "dots", "block"] = "none"  # recompute: all but matmuls; whole blocks
    seed: int = 0  # of initialisation, data order and dropout
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between validations; 0 = a tenth of the steps
    eval_batches: int = 20  # batches of a validation
    save_every: int = 0  # steps between checkpoints; 0 = with every validation
    keep: int = 2  # newest checkpoints kept, beside the best
    disk_full: Literal["continue", "stop"] = "continue"  # a checkpoint finds no room: warn, or stop
    max_skips: int = 5  # updates skipped in a row (loss or gradient not finite, spikes) before the run stops
    spike_z: float = 0.0  # skip updates whose loss or gradient norm is so many deviations up; 0 = never
    spike_window: int = 128  # recent steps that spikes are judged by
    loss_scale: float = 65536.0  # float16: first factor on the loss; an overflow halves it
    loss_scale_steps: int = 2000  # float16: steps without overflow after which it doubles
    plots: bool = True  # draw plots/ at checkpoints

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "seq_len", "accumulation", "log_every", "eval_batches", "keep")
        for name in (*positive, "max_skips", "spike_window", "loss_scale", "loss_scale_steps"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        for name in ("eval_every", "save_every", "seed", "spike_z"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")
        require(
            not self.spike_z or self.spike_window > 1,
            f"train.spike_window={self.spike_window} must be at least 2 with spike_z={self.spike_z}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"train.batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}",
        )

    @property
    def eval_interval(self) -> int:
        """Steps between validations."""
        return self.eval_every or max(1, self.steps // 10)

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or self.eval_interval


@dataclass(frozen=True)
class LogConfig:
    """What a run says of itself, and where besides metrics.jsonl; may change when a run goes on."""

    details: bool = True  # norms and update ratios by group, entropies of logits and routers
    tensorboard: bool = False  # write tensorboard/ (needs jaxlm[tensorboard])
    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases (needs jaxlm[wandb])
    wandb_project: str = "jaxlm"  # its project


@dataclass(frozen=True)
class RunConfig:
    """A whole run; what `config.json` of a run directory holds."""

    model: ModelConfig  # the decoder
    data: DataConfig = field(default_factory=DataConfig)  # where tokens come from
    optim: OptimConfig = field(default_factory=OptimConfig)  # optimizer and schedule
    train: TrainConfig = field(default_factory=TrainConfig)  # the loop
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices per axis, for example fsdp=4,expert=2
    log: LogConfig = field(default_factory=LogConfig)  # metrics and where they go

    def __post_init__(self) -> None:
        require(
            self.train.seq_len <= self.model.context,
            f"train.seq_len={self.train.seq_len} must not exceed model.context={self.model.context}",
        )
        micro = self.train.batch_size // self.train.accumulation
        ways = self.mesh.data * self.mesh.fsdp * self.mesh.expert
        require(
            micro % ways == 0,
            f"train.batch_size/accumulation={micro} must be a multiple of the mesh's data*fsdp*expert={ways}",
        )
        if self.mesh.expert > 1:
            require(
                self.model.moe.n_experts > 0 and self.model.moe.n_experts % self.mesh.expert == 0,
                f"mesh expert={self.mesh.expert} splits experts, but moe.n_experts={self.model.moe.n_experts}; "
                "it must be a multiple",
            )
        require(
            self.model.n_kv_heads % self.mesh.tensor == 0,
            f"n_kv_heads={self.model.n_kv_heads} must be a multiple of mesh tensor={self.mesh.tensor}",
        )
        stride = self.data.stride
        require(
            stride <= self.train.seq_len,
            f"data.stride={stride} must not exceed train.seq_len={self.train.seq_len}: tokens between would be lost",
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or ''."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: Any, path: str = "") -> C:
    """The inverse of `to_dict`, for anything that JSON may hold.

    Raises ConfigError on unknown, missing or mistyped keys, named by their path.
    """
    where = f"config key {path[:-1]!r}" if path else "the config"
    require(isinstance(values, dict), f"{where} must be an object, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        require(key in fields, f"unknown config key {path + key!r}{nearest(key, fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require(name in values or not required, f"config key {path + name!r} is missing")
    return cls(**{key: _coerce(hints[key], value, path + key) for key, value in values.items()})


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path + ".")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        require(
            value in args,
            f"{path}={value!r} must be one of {', '.join(map(str, args))}{nearest(str(value), args)}",
        )
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list")
        return tuple(_coerce(args[0], v, path) for v in value)
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**1023, f"{path} must be finite, got an integer of {value.bit_length()} bits")
        return float(value)
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path}={value!r} must be of type {hint.__name__}",
    )
    return value


def load(cls: type[C], path: Path) -> C:
    """Reads a config file. Raises ConfigError with the file's name."""
    try:
        return from_dict(cls, read_object(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not JSON, or refused by the config itself
        raise ConfigError(f"{path}: {error}") from None


def save(config: Any, path: Path) -> None:
    """Writes a config file."""
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
