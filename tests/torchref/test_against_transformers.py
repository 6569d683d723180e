"""torchref against transformers, all in float64; names are mapped here by hand.

Families: Llama, Mistral, Mixtral, Qwen2, Qwen3 and the mixtures Qwen2-MoE and Qwen3-MoE.
"""

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import assert_close, relative_error, tree_errors  # noqa: E402
from hf64 import NoNarrowFloats, double_precision  # noqa: E402
from hf_models import fill  # noqa: E402
from tolerances import tolerance  # noqa: E402

from jaxlm.config import ModelConfig, MoEConfig, RopeScaling, RunConfig, TrainConfig  # noqa: E402
from torchref.model import Decoder  # noqa: E402
from torchref.train import make_gradient_fn  # noqa: E402

pytestmark = pytest.mark.torch

B, T, V, E, L = 3, 37, 97, 4, 2
THETA, EPS, COEF = 5e4, 3e-6, 0.02
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": L,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
    "use_cache": False,
    "attn_implementation": "eager",
}
OURS = ModelConfig(
    vocab_size=V,
    d_model=48,
    n_layers=L,
    n_heads=6,
    n_kv_heads=2,
    head_dim=12,
    d_ff=80,
    context=64,
    rope_theta=THETA,
    norm_eps=EPS,
)
FAMILIES = {  # transformers' module -> its class prefix
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
MIXTURE = {
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": COEF,
    "experts_implementation": "eager",
}
QWEN_MIXTURE = MIXTURE | {"num_experts": E, "moe_intermediate_size": 56}
EXPERTS = MoEConfig(n_experts=E, n_active=2, d_ff=56, balance="mixtral", balance_coef=COEF)
SCALINGS = {
    "none": ({"rope_type": "default"}, RopeScaling()),
    "linear": ({"rope_type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 32,
        },
        RopeScaling("llama3", 8.0, 32, low_freq_factor=1.5, high_freq_factor=6.0),
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
            "original_max_position_embeddings": 16,
        },
        RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.25),
    ),
}


class Oracle(NamedTuple):
    """What transformers says about one batch."""

    logits: Any
    loss: Any
    balance: Any  # None for dense models
    weights: dict[str, Any]
    grads: dict[str, Any]


def our_name(name: str) -> str:
    """transformers' parameter name -> torchref's."""
    table = (
        ("model.embed_tokens.", "embed."),
        ("model.layers.", "blocks."),
        ("model.norm.", "final_norm."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "mlp_norm"),
        ("self_attn", "attn"),
        ("mlp.experts.gate_up_proj", "moe.experts.gate_up"),
        ("mlp.experts.down_proj", "moe.experts.down"),
        ("mlp.gate.weight", "moe.router.weight"),
        ("mlp.shared_expert_gate.", "moe.shared_gate."),
        ("mlp.shared_expert.", "moe.shared."),
    )
    for theirs, ours in table:
        name = name.replace(theirs, ours)
    return name


def batch(padded: bool) -> tuple[Any, Any, Any]:
    """ids, attention mask (one row padded on the left, one on the right) and labels with holes, all [B, T]."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, V, (B, T), generator=generator)
    mask = torch.ones((B, T), dtype=torch.long)
    if padded:
        mask[1, :9] = 0
        mask[2, 30:] = 0
    labels = torch.where(torch.rand((B, T), generator=generator) < 0.8, ids, -100)
    # The first real token of a row has a padding token before it, whose prediction is not compared.
    starts = (mask == 1) & (mask.cumsum(1) == 1)
    return ids, mask, torch.where((mask == 1) & ~starts, labels, -100)


def ask(family: str, std: float | None, padded: bool, rope: dict[str, Any], **changes: Any) -> Oracle:
    """Runs transformers forward and backward; no operation may make anything narrower than float64."""
    modelling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rope_utils = importlib.import_module("transformers.modeling_rope_utils")
    loss_utils = importlib.import_module("transformers.loss.loss_utils")
    title = FAMILIES[family]
    ids, mask, labels = batch(padded)
    with double_precision(modelling, rope_utils, loss_utils):
        config = getattr(transformers, f"{title}Config")(
            **(SIZES | changes), rope_parameters=rope | {"rope_theta": THETA}
        )
        model = getattr(transformers, f"{title}ForCausalLM")(config).double().train()
        fill(model, std)
        with NoNarrowFloats():
            out = model(input_ids=ids, attention_mask=mask if padded else None, labels=labels)
            out.loss.backward()
    named = dict(model.named_parameters())
    weights = {our_name(name): p.detach() for name, p in named.items()}
    grads = {our_name(name): p.grad for name, p in named.items()}
    return Oracle(out.logits.detach(), out.loss.detach(), getattr(out, "aux_loss", None), weights, grads)


def check(config: ModelConfig, oracle: Oracle, padded: bool) -> None:
    """Logits at real positions, loss, balance loss and every gradient of torchref equal the oracle's."""
    ids, mask, labels = batch(padded)
    model = Decoder(config, rngs=torch.Generator(), dtype=torch.float64)
    model.load_state_dict(oracle.weights, strict=True)
    rows = {
        "inputs": ids,
        "targets": ids.roll(-1, 1),
        "loss_mask": torch.cat([labels[:, 1:] != -100, torch.zeros(B, 1, dtype=torch.bool)], 1).double(),
    } | ({"segments": mask} if padded else {})
    train = TrainConfig(batch_size=B, seq_len=T, dtype="float64", param_dtype="float64")
    with NoNarrowFloats():
        logits, _, _ = model(ids, segments=mask if padded else None)
        grads, metrics = make_gradient_fn(RunConfig(config, train=train))(model, rows)
    limit, real = tolerance("f64_transformers"), mask.bool()
    errors = {"logits": relative_error(logits[real].detach(), oracle.logits[real])}
    errors["loss"] = relative_error(metrics["total_loss"], oracle.loss)
    if oracle.balance is not None:
        errors["balance"] = relative_error(metrics["balance"], oracle.balance.detach())
    assert_close(errors, limit, "outputs")
    assert_close(
        tree_errors(grads, oracle.grads, lambda name: constant_scores(config, name)), limit, "gradients"
    )
    empty = [name for name, g in oracle.grads.items() if not constant_scores(config, name) and g.norm() == 0]
    assert not empty, f"gradients of the oracle are zero and prove nothing: {empty}"


def constant_scores(config: ModelConfig, name: str) -> bool:
    """Under a window of one position the softmax has one entry: the gradients of q and k are zero."""
    return config.windows == (1,) and name.endswith(("q_proj.weight", "k_proj.weight"))


@pytest.fixture(params=[0.02, None], ids=["std", "fan_in"])
def std(request: pytest.FixtureRequest) -> float | None:
    """Both initialisations: small weights hide errors of softmax and RoPE, large ones those of the norms' eps."""
    return request.param


@pytest.fixture(params=[False, True], ids=["full", "padded"])
def padded(request: pytest.FixtureRequest) -> bool:
    """Whole rows, and rows padded on the left and on the right."""
    return request.param


@pytest.mark.parametrize("scaling", SCALINGS)
def test_llama_equals_transformers_under_every_rope_scaling(scaling: str, std: float | None) -> None:
    """Grouped-query attention, SwiGLU, RMSNorm and each RoPE formula."""
    rope, ours = SCALINGS[scaling]
    check(replace(OURS, rope_scaling=ours), ask("llama", std, False, rope), False)


def test_llama_equals_transformers_on_padded_rows(std: float | None) -> None:
    """Left and right padding: real positions are compared, gradients are those of the masked loss."""
    check(OURS, ask("llama", std, True, SCALINGS["none"][0]), True)


def test_biased_and_tied_llama_equals_transformers(std: float | None) -> None:
    """Biases on every projection, and a head whose gradient adds to the embedding's."""
    oracle = ask(
        "llama", std, True, SCALINGS["none"][0], attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
    check(replace(OURS, qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied=True), oracle, True)


@pytest.mark.parametrize("window", [1, 2, 16, T - 1, T, T + 1])
def test_mistral_equals_transformers_for_every_window(window: int, std: float | None) -> None:
    """A window of W positions includes the query's own."""
    oracle = ask("mistral", std, False, SCALINGS["none"][0], sliding_window=window)
    check(replace(OURS, windows=(window,)), oracle, False)


def test_mixtral_equals_transformers_with_its_balance_loss(padded: bool, std: float | None) -> None:
    """Routing, experts, and the balance loss with its gradient; padding takes no part in it."""
    sizes = MIXTURE | {"num_local_experts": E, "intermediate_size": 56}
    oracle = ask("mixtral", std, padded, SCALINGS["none"][0], **sizes)
    check(replace(OURS, moe=EXPERTS), oracle, padded)


def test_qwen2_equals_transformers(padded: bool, std: float | None) -> None:
    """Biases on q, k and v, none on the attention output."""
    check(replace(OURS, qkv_bias=True), ask("qwen2", std, padded, SCALINGS["none"][0]), padded)


def test_qwen3_equals_transformers(padded: bool, std: float | None) -> None:
    """RMSNorm over each head of q and k, before RoPE."""
    check(replace(OURS, qk_norm=True), ask("qwen3", std, padded, SCALINGS["none"][0]), padded)


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "raw"])
def test_qwen3_moe_equals_transformers_with_either_router(
    renormalize: bool, padded: bool, std: float | None
) -> None:
    """Chosen probabilities made to sum to one, or left as they are; normed q and k; the balance loss."""
    sizes = QWEN_MIXTURE | {"norm_topk_prob": renormalize}
    oracle = ask("qwen3_moe", std, padded, SCALINGS["none"][0], **sizes)
    check(replace(OURS, qk_norm=True, moe=replace(EXPERTS, renormalize=renormalize)), oracle, padded)


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ({"num_hidden_layers": 4, "decoder_sparse_step": 2}, (False, True)),
        ({"num_hidden_layers": 3, "mlp_only_layers": [1]}, (True, False, True)),
    ],
    ids=["every_second", "listed"],
)
def test_qwen3_moe_equals_transformers_with_dense_layers(
    layers: dict[str, Any], pattern: tuple[bool, ...], padded: bool, std: float | None
) -> None:
    """Dense layers between mixtures have a width of their own and take no part in the balance loss."""
    sizes = QWEN_MIXTURE | {"norm_topk_prob": True} | layers
    oracle = ask("qwen3_moe", std, padded, SCALINGS["none"][0], **sizes)
    moe = replace(EXPERTS, pattern=pattern)
    check(replace(OURS, n_layers=layers["num_hidden_layers"], qk_norm=True, moe=moe), oracle, padded)


def test_qwen2_moe_equals_transformers_with_its_gated_shared_expert(padded: bool, std: float | None) -> None:
    """A shared expert of its own width behind a sigmoid gate; raw router probabilities; biases on q, k and v."""
    sizes = QWEN_MIXTURE | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}
    oracle = ask("qwen2_moe", std, padded, SCALINGS["none"][0], **sizes)
    moe = replace(EXPERTS, renormalize=False, shared_d_ff=40, shared_gate=True)
    check(replace(OURS, qkv_bias=True, moe=moe), oracle, padded)


def test_the_oracle_is_float64_only_when_patched() -> None:
    """Without the patch the same model makes float32, and the dispatch mode says so."""
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": THETA})
    model = transformers.LlamaForCausalLM(config).double()
    with pytest.raises(AssertionError, match=r"made torch\.float32"), NoNarrowFloats():
        model(input_ids=batch(False)[0])
