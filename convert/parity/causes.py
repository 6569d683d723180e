"""Likely causes by the place where two decoders part, from the divergences that bite ports of decoders.

A list of suspects for a person, most likely first; nothing is judged by it.
"""

import re
from collections.abc import Mapping
from typing import Any

# (rung, operation) as regular expressions -> what usually stands behind it.
CAUSES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "config",
        ".*",
        ("a field was lost on export or read under another name; theta and eps fall back to defaults",),
    ),
    ("init", ".*", ("initialisers differ: truncation, fan-in, a uniform default, or a missing 1/sqrt(2L)",)),
    (
        "rope",
        ".*",
        ("theta, scaling or attention factor differ", "angles computed in float32 instead of float64"),
    ),
    ("activations", r"embed", ("ids out of range, a scaled embedding, or learned positions not added",)),
    (
        "activations",
        r"(attn_norm|mlp_norm|final_norm|attn\.[qk]_norm)",
        (
            "another eps, or eps outside the root",
            "mean subtracted (LayerNorm), 1 + weight (Gemma), or statistics in a narrower dtype",
        ),
    ),
    (
        "activations",
        r"attn\.[qk]",
        (
            "interleaved against half-split RoPE, or its sign",
            "positions not restarted in packed rows, or offset by padding",
            "a transposed or mis-reshaped projection; q/k norm missing or after RoPE",
        ),
    ),
    ("activations", r"attn\.v", ("v and k exchanged, or a transposed or mis-reshaped projection",)),
    (
        "activations",
        r"attn\.scores",
        (
            "scale other than 1/sqrt(head_dim)",
            "mask: window off by one (W keys include the query's own), padding or packed segments visible",
            "query heads matched to kv heads by tiling instead of n // G",
        ),
    ),
    (
        "activations",
        r"attn\.heads",
        (
            "softmax in a narrower dtype, or a row without keys not zeroed",
            "values matched to query heads by tiling instead of n // G",
        ),
    ),
    ("activations", r"attn", ("output projection: heads merged in another order, or a missing bias",)),
    ("activations", r"moe\.router_logits", ("router in a narrower dtype, or a transposed router",)),
    ("activations", r"moe\.expert_ids", ("ties broken otherwise, or top-k over other scores",)),
    (
        "activations",
        r"moe\.weights",
        ("no renormalisation of the chosen probabilities, softmax after top-k without it, or sigmoid",),
    ),
    ("activations", r"moe\.kept", ("capacity counted over other tokens, or in another order",)),
    (
        "activations",
        r"moe\.combined",
        ("gate and up exchanged, experts in another order, or weights applied twice",),
    ),
    ("activations", r"moe", ("the shared expert or its gate",)),
    (
        "activations",
        r"mlp",
        ("gate and up exchanged, another activation (erf against tanh GELU), or a missing bias",),
    ),
    ("activations", r"block", ("a residual connection: missing, scaled, or taken after the norm",)),
    ("activations", r"logits", ("head: not tied, transposed, scaled, or its bias missing",)),
    ("ties", ".*", ("torch.topk breaks ties in no fixed order; lax.top_k takes the lowest index",)),
    ("loss", r"cross_entropy", ("mask or shift of the targets; mean over other tokens",)),
    ("loss", r"balance", ("another of the six reductions in use, padding counted, or a factor of k or E",)),
    ("loss", r".*z", ("z-loss over other tokens, or its square missing",)),
    ("loss", r"total_loss", ("a coefficient lost or applied twice",)),
    (
        "gradients",
        r".*router.*",
        ("gradient through the chosen ids, or a stopped gradient in the balance loss",),
    ),
    ("gradients", r".*experts.*", ("a hand-written backward pass of the grouped product",)),
    ("gradients", r"embed.*", ("a tied head adds to the embedding's gradient",)),
    ("gradients", r".*", ("a stopped gradient, or a hand-written backward pass",)),
    (
        "accumulation",
        r".*",
        ("mean of the micro-batches' means instead of a sum over the global token count",),
    ),
    ("clip", r".*", ("norm in a narrower dtype or per tensor", "optax's clip has no 1e-6, torch's has")),
    ("schedule", r".*", ("warmup starts at 0 instead of 1/w, or the decay counts the warmup",)),
    ("updates?|trajectory", r"m:.*", ("first moment fed with unclipped gradients, or another b1",)),
    ("updates?|trajectory", r"v:.*", ("second moment: b2, or the square of other gradients",)),
    (
        "updates?|trajectory",
        r"delta:.*",
        (
            "bias correction in float32 or missing, eps inside the root",
            "weight decay: other parameters, coupled to the gradient, or not times the learning rate",
        ),
    ),
    ("updates?|trajectory", r"count.*", ("steps counted from another start",)),
    ("handover", r".*", ("moments or the step count are lost between the frameworks",)),
    (
        "sft",
        r"(padded|packed) \w+",
        ("the loader: masks and targets of an example, where one ends and the next begins, its positions",),
    ),
    ("sft", r"packed in .*", ("an example sees its neighbours in a row, or its place in the row",)),
    ("lora_init", r"start.*", ("b must start at zero, a uniform within 1/sqrt(in)",)),
    ("lora_init", r".*", ("other weights are adapted, or something of the base is not frozen",)),
    (
        "lora_updates",
        r"base in .*",
        ("the base is not frozen: it gets a gradient, an update or weight decay",),
    ),
    ("lora.*", r"(un)?merged.*", ("the scale: alpha / R or alpha / sqrt(R), once; dropout in the adapter",)),
    (
        "lora",
        r".*",
        (
            "the scale: alpha / R or alpha / sqrt(R), an override's own",
            "a factor transposed, of another projection or expert, gate and up exchanged; dropout left on",
        ),
    ),
    ("lora_nf4", r"base.*", ("levels, blocks in another layout, or the absmax's own quantisation",)),
    (
        "lora_nf4",
        r".*",
        ("dequantised values, or a backward pass that does not dequantise as the forward does",),
    ),
    ("dpo", r"pairs .*", ("the loader: chosen first, each with its own mask",)),
    (
        "dpo",
        r".*logps.*",
        ("log-probabilities: mask or shift, mean instead of sum, or divided by other pairs",),
    ),
    (
        "dpo",
        r".*(rewards|references).*",
        ("the reference: other weights, an adapter left on, answers exchanged; or beta",),
    ),
    ("dpo", r".* loss", ("the sign of the margin, label smoothing, or IPO's lengths and margin",)),
    ("decoding", r".*prefill.*", ("left padding: positions, or padding visible",)),
    ("decoding", r".*", ("position offset of cached steps, slot of the write, or the mask over the cache",)),
    ("greedy|sampling", r".*", ("ties, temperature, or noise of another row",)),
    ("mesh", r".*", ("a missing or doubled sum over devices, or an expert's index on its device",)),
)


def likely_causes(rung: str, operation: str, detail: Mapping[str, Any]) -> list[str]:
    """Suspects for a divergence: what the values themselves say first, then what the place suggests."""
    told = [str(detail["looks_like"])] if detail.get("looks_like") else []
    if "error" in detail:
        told.append(str(detail["error"]).splitlines()[0])
    if rung in ("tree", "conversion") and not told:
        told = ["a conversion rule: transpose, order of rows or experts, a rounding, or the wrong tensor"]
    for rungs, operations, causes in CAUSES:
        if re.fullmatch(rungs, rung.removesuffix("_cap")) and re.fullmatch(operations, operation):
            return told + list(causes)
    return told
