"""What the numbers of metrics.jsonl are called in TensorBoard and W&B. No framework here."""

import math
from collections.abc import Mapping
from typing import Any

# Key of metrics.jsonl -> its name in TensorBoard and W&B, where what comes before / is a group of its own.
NAMES = {
    "loss": "loss/train",
    "val_loss": "loss/val",
    "total_loss": "loss/total",
    "z": "loss/z",
    "balance": "loss/balance",
    "router_z": "loss/router_z",
    "perplexity": "perplexity/train",
    "val_perplexity": "perplexity/val",
    "bits_per_byte": "bits_per_byte/train",
    "val_bits_per_byte": "bits_per_byte/val",
    "lr": "optimizer/lr",
    "clip_scale": "optimizer/clip_scale",
    "loss_scale": "optimizer/loss_scale",
    "grad_norm": "norms/gradients",
    "param_norm": "norms/parameters",
    "update_norm": "norms/updates",
    "update_ratio": "norms/update_ratio",
    "logit_entropy": "entropy/logits",
    "router_entropy": "entropy/router",
    "dropped": "experts/dropped",
    "skipped": "guard/skipped",
    "skips": "guard/skips",
    "skips_in_a_row": "guard/skips_in_a_row",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "peak_memory_bytes": "speed/peak_memory_bytes",
    "tokens": "progress/tokens",
    "flops": "progress/flops",
}
BY_GROUP = {
    "grad_norm": "norms_gradients",
    "param_norm": "norms_parameters",
    "update_norm": "norms_updates",
    "update_ratio": "norms_update_ratio",
}
LOAD = "expert_load"


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line under the names that people see; of `expert_load`, the fullest expert's load.

    That load is a multiple of the balanced one: 1 = balanced, E = all tokens go to one expert.
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if key == "step" or value is None:
            continue
        if key == LOAD:
            loads = [[float(share) for share in layer] for layer in value]
            found |= {f"experts/fullest_{i:02d}": len(layer) * max(layer) for i, layer in enumerate(loads)}
        elif isinstance(value, (int, float)):
            base, _, group = key.partition("/")
            group_name = f"{BY_GROUP.get(base, base)}/{group}" if group else f"other/{base}"
            found[NAMES.get(key, group_name)] = float(value)
    return {name: value for name, value in found.items() if math.isfinite(value)}
