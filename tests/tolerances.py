"""Every tolerance of the tests, each with its reason; a test names a gate instead of writing a number.

Errors are relative in the Euclidean norm, per tensor (`helpers.relative_error`), unless the reason says absolute.
"""

from typing import NamedTuple

from convert.parity.limits import LIMITS


class Gate(NamedTuple):
    """A largest allowed error and why it is this large and no larger."""

    value: float
    reason: str


GATES: dict[str, Gate] = {
    # The parity suite's own limits, for the tests that compare what it compares.
    "f64": Gate(*LIMITS["float64"]),
    "f64_state": Gate(*LIMITS["float64_state"]),
    "f64_delta": Gate(*LIMITS["float64_delta"]),
    "f64_mesh": Gate(1e-12, "float64 on any mesh against one device: sums are reordered, measured 1.5e-15"),
    "f64_transformers": Gate(1e-12, "float64 against patched transformers: measured 1e-15 to 1.1e-14"),
    "f64_gptoss": Gate(
        1e-12, "float64 against the transcribed formulas, sums in another order: measured 5e-16"
    ),
    "f64_gptoss_state": Gate(
        1e-11, "float64 weights and moments after one AdamW step, which divides by sqrt(v): measured 9e-16"
    ),
    "f64_peft": Gate(1e-12, "float64 against peft, factors multiplied in another order: measured 1.4e-13"),
    "f32_onnx": Gate(*LIMITS["float32_onnx"]),
    "f32_transformers": Gate(2e-6, "float32 logits of transformers against torchref in float64, as f32_onnx"),
    "f32_llama_cpp": Gate(1e-6, "llama.cpp in float32 against float64: measured 1.2e-7 to 3.8e-7"),
    "f16_llama_cpp": Gate(2e-3, "llama.cpp on F16 weights, activations rounded too: measured 4e-4"),
    "bf16_llama_cpp": Gate(2e-2, "llama.cpp on BF16 weights, activations rounded too: measured 3.3e-3"),
    "q8_0_llama_cpp": Gate(
        3e-2, "llama.cpp on Q8_0, activations rounded to 8 bits per block: measured 1.2e-2"
    ),
    "f64_accumulation": Gate(
        1e-12, "float64 micro-batches against the full batch: sums are reordered, nothing else"
    ),
    "f64_decode": Gate(1e-12, "float64 decoding with a cache against the full forward: measured 1.7e-15"),
    "f64_quant": Gate(
        1e-12, "float64 on quantised weights, equal to the bit: sums are reordered, nothing else"
    ),
    "eight_bit_loss": Gate(
        1e-2, "loss with moments in 8 bits against AdamW's, the largest of 200 steps: measured 1.7e-3"
    ),
    "f64_muon": Gate(
        1e-12,
        "float64 Newton-Schulz in another order of products, which grows small values by 485: measured 3e-14",
    ),
    "f64_scalar": Gate(1e-15, "a double computed on the host against 50 digits: a few roundings of 1.1e-16"),
    "f64_score": Gate(
        1e-12, "float64 log-probabilities and perplexity, windows in batches against one token at a time"
    ),
    "bf16_attention": Gate(
        2e-2, "bfloat16 gradients against float32, of the largest's norm: measured 3e-3 to 8e-3"
    ),
    "half_attention": Gate(
        2.0,
        "error in half precision over the plain form's, both against float64, 600 keys: measured 0.7 to 1.4",
    ),
    "bf16_head": Gate(5e-3, "log-probabilities of bfloat16 logits, rounded to it or not: measured 6e-4"),
    "f32_hflm": Gate(
        2e-6, "float32 likelihoods against lm_eval's HFLM on the same weights: sums of some tens of tokens"
    ),
    "f32_perplexity": Gate(1e-6, "float32 perplexity against float64"),
    "f32_decode": Gate(5e-6, "float32 decoding with a cache against the full forward: measured 6.6e-7"),
    "f32_quant_error": Gate(
        1e-3,
        "error of int4 weights against the formula in float64: a few values lie on a border between codes",
    ),
    "f32_tie_margin": Gate(
        1e-4,
        "difference of the two largest logits of order one, absolute, under which float32 may choose either",
    ),
    "f32_mesh": Gate(5e-6, "float32 on any mesh against one device: measured 8.4e-7"),
    "f32_loss": Gate(5e-7, "float32 loss of the two frameworks: measured 1.3e-7"),
    "f32_grad_norm": Gate(
        2e-6, "float32 gradient norm of the two frameworks: measured 1e-7, 1.8e-6 at fan-in weights"
    ),
    "f32_ratio": Gate(
        2.5, "float32 error of jaxlm against float64 over torch's own error: measured up to 1.65"
    ),
    "device_float32_ratio": Gate(
        2.5, "float32 on a card: jaxlm's distance from float64 over torch's, 1.65 on CPU"
    ),
    "device_bfloat16_ratio": Gate(1.5, "bfloat16 on a card, whole logits and gradient: 0.92 to 1.05 on CPU"),
    "device_dense_float32_cap": Gate(1e-5, "float32 at highest precision: 6e-7 on CPU, TF32 would be 1e-3"),
    "device_moe_float32_cap": Gate(1e-5, "as dense: no routing flips were seen in 8,192 float32 decisions"),
    "device_dense_bfloat16_cap": Gate(5e-2, "bfloat16 activations: 9e-3 on CPU at this depth"),
    "device_moe_bfloat16_cap": Gate(2.5e-1, "bfloat16 routing flips a share of the tokens: 5e-2 on CPU"),
    "f32_attention": Gate(5e-6, "float32 activations of equal implementations of attention: measured 2e-7"),
    "bf16_activations": Gate(3e-2, "bfloat16 activations of a tiny decoder against float32: measured 9.4e-3"),
    "f16_training": Gate(
        5e-4, "losses of 30 steps of a tiny decoder in float16 against float32: measured 6.6e-5"
    ),
    "f64_logits": Gate(
        1e-14, "processed float64 logits against transformers, before temperature: two or three roundings"
    ),
    "f32_logits": Gate(
        2e-6, "processed float32 logits against transformers, before temperature: two or three roundings"
    ),
    "f32_trl_loss": Gate(
        1e-6, "float32 preference loss on TRL's own log-probabilities, one formula: measured 1.2e-7"
    ),
    "f32_trl": Gate(
        1e-5,
        "float32 preference loss, rewards and log-probabilities against TRL, end to end: measured 9.5e-7",
    ),
    "f32_trl_gradients": Gate(
        1e-5, "float32 gradients of the policy against TRL's, end to end: measured 1.5e-6"
    ),
    "f64_differences": Gate(1e-7, "slope against central differences of 1e-5 in float64: measured 3.1e-9"),
    "f64_dpo": Gate(
        1e-12, "float64 preferences of the two frameworks, sums reordered: rewards 1.1e-14, gradients 3.2e-15"
    ),
    "f32_top_p": Gate(1e-5, "absolute: a sum of 32,000 float32 probabilities decides about this much mass"),
    "f64_packed": Gate(
        1e-12, "float64 loss of packed documents against one at a time: sums are reordered, measured 0"
    ),
    "f64_examples": Gate(
        1e-12, "float64 loss and gradients of packed examples against one by one: measured 1e-15"
    ),
    "p_value": Gate(
        1e-4, "smallest p of a statistical test with fixed seeds; not an error but a lower bound"
    ),
    "open_10b_s": Gate(
        0.25,
        "seconds to open 10 billion tokens in 150 shards, quick check: measured 0.03 to 0.06 on busy cores",
    ),
    "batch_10b": Gate(
        10.0,
        "time of a batch from 10 billion tokens over that from 10 million: measured 1.2; a scan costs 1,000",
    ),
    "f32_reordered": Gate(
        5e-6, "float32 sums in another order: grouped experts, a fused head, compiled graphs: measured 7e-7"
    ),
    "sigmas": Gate(5.0, "largest deviation of a sampled mean in standard errors"),
}


def tolerance(name: str) -> float:
    """The value of a gate."""
    return GATES[name].value
