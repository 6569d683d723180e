"""Tiny transformers models of every family, in float64: what the tests of Hugging Face conversion are judged by."""

import importlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from hf64 import NoNarrowFloats, double_precision

V, T = 61, 24
THETA = 5e4  # no class's default
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-6,
    "initializer_range": 0.03,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
_MIXTURE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
_QWEN_MIXTURE = _MIXTURE | {"num_experts": 4, "moe_intermediate_size": 20}


class Case(NamedTuple):
    """One transformers model: its class, what it is told, and its rotary scaling."""

    title: str
    changes: dict[str, Any]
    rope: dict[str, Any] = {"rope_type": "default"}

    @property
    def config_class(self) -> Any:
        """The configuration class."""
        return getattr(transformers, f"{self.title}Config")

    @property
    def modules(self) -> list[Any]:
        """The modules that `double_precision` has to widen."""
        name = self.config_class.model_type
        names = [
            f"transformers.models.{name}.modeling_{name}",
            "transformers.modeling_rope_utils",
            "transformers.generation.utils",
        ]
        return [importlib.import_module(name) for name in names]


CASES = {
    "llama": Case(
        "Llama",
        {},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama_biased_tied": Case(
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_type": "linear", "factor": 2.5},
    ),
    "mistral": Case(
        "Mistral",
        {"sliding_window": 5, "num_key_value_heads": 6},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
            "original_max_position_embeddings": 16,
        },
    ),
    "mixtral": Case("Mixtral", _MIXTURE | {"num_local_experts": 4}),
    "qwen2": Case(
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": Case(
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2_moe": Case(
        "Qwen2Moe",
        _QWEN_MIXTURE
        | {"shared_expert_intermediate_size": 16, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": Case(
        "Qwen3Moe",
        _QWEN_MIXTURE
        | {"norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 9},
    ),
}


def fill(model: Any, std: float | None) -> None:
    """Random weights: normal with `std`, or 1/sqrt(fan-in) where None; norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim == 1:
                p.copy_(0.1 * noise + (1.0 if "norm" in name else 0.0))
            elif std is None:
                p.copy_(noise if "embed" in name else noise / math.sqrt(p.shape[-1]))
            else:
                p.copy_(std * noise)


def build(case: Case, std: float | None = None, **changes: Any) -> Any:
    """A transformers model with random float64 weights."""
    config = case.config_class(
        **(SIZES | case.changes | changes), rope_parameters=case.rope | {"rope_theta": THETA}
    )
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = getattr(transformers, f"{case.title}ForCausalLM")(config).double()
    fill(model, std)
    return model


def prompt() -> torch.Tensor:
    """Token ids, [2, T]."""
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(2))


def mark() -> torch.Tensor:
    """A fixed direction in the space of logits; its product with them is what gradients are taken of."""
    return torch.randn((2, T, V), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Oracle(NamedTuple):
    """What transformers computes in float64."""

    logits: torch.Tensor
    grads: dict[str, torch.Tensor]
    generated: list[list[int]]


def ask(case: Case, std: float | None, directory: Path, new_tokens: int) -> Oracle:
    """Saves a model to `directory`, and computes logits, gradients and the greedy continuation of a prompt."""
    with double_precision(*case.modules):
        model = build(case, std).eval()
        model.save_pretrained(directory)
        model.generation_config.eos_token_id = None
        with NoNarrowFloats():
            logits = model(input_ids=prompt()).logits
            (logits * mark()).sum().backward()
            out = model.generate(
                prompt(),
                attention_mask=torch.ones_like(prompt()),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
    grads = {name: p.grad for name, p in model.named_parameters()}
    return Oracle(logits.detach(), grads, out[:, T:].tolist())
