"""The named runs: what each model is, where its numbers come from and how many parameters it has.

`Preset.params` stands here as a literal so that it can be read, quoted and checked; `param_count` must agree.
Settings that a source leaves open are chosen here, and the note says so.
"""

from dataclasses import dataclass

from jaxlm.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    nearest,
)


@dataclass(frozen=True)
class Preset:
    """A run by name."""

    config: RunConfig  # everything the run is told
    source: str  # where the numbers come from
    params: int  # exact total; a tied head counts once
    note: str  # what differs from the source, or was chosen here


def preset(name: str) -> RunConfig:
    """The run called `name`. Raises ConfigError, with the nearest name, for one that is not there."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}{nearest(name, PRESETS)}; presets are {', '.join(PRESETS)}"
        )
    return PRESETS[name].config


def _quickstart(d_ff: int, moe: MoEConfig) -> RunConfig:
    """One decoder and one schedule: 600 steps of 8 x 256 are 1.23M tokens."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=2_048,
            d_model=192,
            n_layers=4,
            n_heads=6,
            n_kv_heads=2,
            head_dim=48,
            d_ff=d_ff,
            context=1_024,
            rope_theta=50_000.0,
            norm_eps=3e-6,
            moe=moe,
        ),
        optim=OptimConfig(lr=4e-3, min_lr=2e-4, warmup_steps=30),
        train=TrainConfig(steps=600, batch_size=8, seq_len=256, eval_every=100),
    )


def _astragpt(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> RunConfig:
    """Heads of 128, 8 of them for keys and values; fine-tuning at an effective batch of 16, 5 % warmup."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=64_000,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=8,
            head_dim=128,
            d_ff=d_ff,
            context=2_048,
            rope_theta=1_000_000.0,
            norm_eps=1e-5,
        ),
        optim=OptimConfig(lr=2e-4, min_lr=0.0, warmup_steps=100),
        train=TrainConfig(steps=2_000, batch_size=16, seq_len=2_048, accumulation=8, dtype="bfloat16"),
    )


_GPTOSS_DATA = DataConfig(tokenizer="o200k_base")
_GPTOSS_OPTIM = OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=1_000, b1=0.9, b2=0.95, weight_decay=0.1)
_GPTOSS_TRAIN = TrainConfig(steps=2_000, batch_size=16, seq_len=2_048, accumulation=8, dtype="bfloat16")

_GPTOSS = RunConfig(
    model=ModelConfig(
        vocab_size=200_019,
        d_model=1_024,
        n_layers=12,
        n_heads=32,
        n_kv_heads=8,
        head_dim=32,
        d_ff=2_048,
        context=2_048,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        moe=MoEConfig(n_experts=32, n_active=2),
    ),
    data=_GPTOSS_DATA,
    optim=_GPTOSS_OPTIM,
    train=_GPTOSS_TRAIN,
)

_GPTOSS_ORIGINAL = RunConfig(
    model=ModelConfig(
        vocab_size=200_019,
        d_model=1_024,
        n_layers=12,
        n_heads=32,
        n_kv_heads=8,
        head_dim=32,
        d_ff=2_048,
        context=2_048,
        rope_theta=10_000.0,
        norm_eps=1.1920929e-07,
        mlp="gelu_erf",
        attn_out_bias=True,
        head_bias=True,
        attn_bias_table=True,
        dropout=0.1,
        moe=MoEConfig(
            n_experts=32,
            n_active=2,
            capacity_factor=1.25,
            balance="layer_sum",
            balance_coef=0.01,
            expert_bias=True,
        ),
    ),
    data=_GPTOSS_DATA,
    optim=OptimConfig(
        lr=3e-4, min_lr=3e-5, warmup_steps=1_000, b1=0.9, b2=0.95, decay="matrices_and_embeddings"
    ),
    train=_GPTOSS_TRAIN,
)


def _tfm(vocab_size: int) -> RunConfig:
    """Multi-head attention; the two models differ in the vocabulary only."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=896,
            n_layers=12,
            n_heads=14,
            n_kv_heads=14,
            head_dim=64,
            d_ff=2_624,
            context=4_096,
            rope_theta=10_000.0,
            norm_eps=1e-5,
        ),
        optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=500),
        train=TrainConfig(steps=10_000, batch_size=16, seq_len=4_096, accumulation=2, dtype="bfloat16"),
    )


_MINIGPT = RunConfig(
    model=ModelConfig(
        vocab_size=50_257,
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        d_ff=2_048,
        context=1_024,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied=True,
        dropout=0.1,
    ),
    data=DataConfig(tokenizer="gpt2"),
    optim=OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=500),
    train=TrainConfig(steps=10_000, batch_size=32, seq_len=1_024, dtype="bfloat16"),
)

_SMOLGPT = RunConfig(
    model=ModelConfig(
        vocab_size=16_384,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        d_ff=1_408,
        context=1_024,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tied=True,
    ),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=200),
    train=TrainConfig(steps=5_000, batch_size=32, seq_len=1_024, dtype="bfloat16"),
)

_LLAMA3_8B = RunConfig(
    model=ModelConfig(
        vocab_size=128_256,
        d_model=4_096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        context=8_192,
        rope_theta=500_000.0,
        norm_eps=1e-5,
    ),
    optim=OptimConfig(lr=3e-4, min_lr=3e-5, warmup_steps=100),
    train=TrainConfig(
        steps=1_000, batch_size=16, seq_len=8_192, accumulation=2, dtype="bfloat16", remat="block"
    ),
)

_LLAMA_1B = RunConfig(
    model=ModelConfig(
        vocab_size=32_000,
        d_model=2_048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        head_dim=64,
        d_ff=5_632,
        context=2_048,
        rope_theta=10_000.0,
        norm_eps=1e-5,
    ),
    optim=OptimConfig(lr=4e-4, min_lr=4e-5, warmup_steps=2_000),
    train=TrainConfig(steps=10_000, batch_size=1_024, seq_len=2_048, accumulation=64, dtype="bfloat16"),
)

PRESETS: dict[str, Preset] = {
    "quickstart": Preset(
        _quickstart(d_ff=256, moe=MoEConfig(n_experts=8, n_active=2, balance="mixtral", balance_coef=0.1)),
        source="this project; the layout is Mixtral's (arXiv:2401.04088)",
        params=6_102_720,
        note="2,563,776 active; theta, eps and head_dim differ from transformers' defaults, so that losing one shows",
    ),
    "quickstart-dense": Preset(
        _quickstart(d_ff=512, moe=MoEConfig()),
        source="this project; the layout is Llama's (arXiv:2302.13971)",
        params=2_557_632,
        note="the FLOPs of quickstart, its router aside: one MLP as wide as two experts",
    ),
    "astragpt-7b": Preset(
        _astragpt(d_model=4_096, n_layers=32, n_heads=32, d_ff=11_008),
        source="model card of AstraGPT-7B",
        params=6_195_253_248,
        note="the card's 7.0B counts attention as full multi-head (2.15B); 8 kv heads make it 1.34B, in all 6.2B; "
        "steps, eps and weight decay chosen here",
    ),
    "astragpt-3b": Preset(
        _astragpt(d_model=3_072, n_layers=26, n_heads=24, d_ff=8_192),
        source="model card of AstraGPT-7B, which names a 3B model without dimensions",
        params=3_010_624_512,
        note="dimensions chosen here",
    ),
    "astragpt-1b": Preset(
        _astragpt(d_model=2_048, n_layers=16, n_heads=16, d_ff=5_632),
        source="model card of AstraGPT-7B, which names a 1B model without dimensions",
        params=1_017_186_304,
        note="dimensions chosen here",
    ),
    "gptoss": Preset(
        _GPTOSS,
        source="README of the gptoss repository, built as this project's decoder",
        params=2_857_434_112,
        note="SwiGLU experts, no biases, no attention bias table, dropless, no dropout; eps chosen here",
    ),
    "gptoss-original": Preset(
        _GPTOSS_ORIGINAL,
        source="code of the gptoss repository",
        params=3_664_132_435,
        note="its code's own count, 1.61B of it attention bias tables; experts have two matrices and biases, "
        "eps is float32's epsilon, capacity is counted on tokens, and every tensor of two or more dimensions decays",
    ),
    "tfm-1.5": Preset(
        _tfm(16_384),
        source="about page of TFM-1.5: 152M parameters, 16k vocabulary, context 4k",
        params=152_557_440,
        note="one solution of the published facts; training settings, theta and eps chosen here",
    ),
    "tfm-1.6": Preset(
        _tfm(24_576),
        source="about page of TFM-1.6: 167M parameters, 24k vocabulary, context 4k",
        params=167_237_504,
        note="one solution of the published facts; training settings, theta and eps chosen here",
    ),
    "minigpt-124m": Preset(
        _MINIGPT,
        source="miniGPT guide: the shape of GPT-2 small with RoPE, RMSNorm and SwiGLU",
        params=123_551_232,
        note="d_ff is 2/3 of 4 D, rounded up to a multiple of 64; steps and batch chosen here",
    ),
    "smolgpt": Preset(
        _SMOLGPT,
        source="project page of SmolGPT: RoPE, RMSNorm, SwiGLU, tied head",
        params=34_087_424,
        note="the page publishes no dimensions: all sizes and training settings chosen here",
    ),
    "llama3-8b": Preset(
        _LLAMA3_8B,
        source="Llama 3 8B (arXiv:2407.21783, table 3) and its released config",
        params=8_030_261_248,
        note="peak learning rate of the paper; steps, warmup and batch chosen here for a short run",
    ),
    "llama-1.1b": Preset(
        _LLAMA_1B,
        source="TinyLlama 1.1B (arXiv:2401.02385)",
        params=1_100_048_384,
        note="learning rates, warmup and the 2M-token batch of the paper; steps chosen here",
    ),
}
