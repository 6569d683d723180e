"""Remat policies of the twin: the same gradients whatever is recomputed, and what is recomputed."""

import numpy as np
import pytest
import torch
from helpers import assert_close, hard_batch, tiny, tree_errors
from tolerances import tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from jaxlm.config import ModelConfig
from torchref.layers import Backends
from torchref.model import Decoder

POLICIES = ("none", "dots", "block")
MODEL = tiny({"pattern": (False, True), "shared_d_ff": 12})
DRY = tiny({"pattern": (False, True)}, dropout=0.25)


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def gradients(
    config: ModelConfig, remat: str, seed: int | None = None, attention: str = "auto"
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Gradients on the hard batch, and how often each operation ran for them."""
    generator = torch.Generator().manual_seed(0)
    backends = Backends(attention=attention)
    model = Decoder(config, backends, rngs=generator, dtype=torch.float64, remat=remat)
    ids = torch.as_tensor(hard_batch()["inputs"], dtype=torch.long)
    key = None if seed is None else torch.Generator().manual_seed(seed)
    with Counted() as counted:
        out, _, _ = model.hidden(ids, key=key)
        out.square().sum().backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return grads, counted.counts


@pytest.mark.parametrize("seed", [None, 3])
def test_every_policy_gives_the_same_gradients(seed: int | None) -> None:
    """Recomputing changes memory, not values; recomputed dropout is the dropout of the forward pass."""
    config = MODEL if seed is None else DRY
    none, dots, block = (gradients(config, remat, seed)[0] for remat in POLICIES)
    assert_close(tree_errors(dots, none), tolerance("f64"), "gradients")
    assert_close(tree_errors(block, none), tolerance("f64"), "gradients")


def test_dots_run_no_product_with_weights_again() -> None:
    """dots: products with weights as often as without remat, but scores again; block: everything again."""
    none, dots, block = (gradients(MODEL, remat, attention="explicit")[1] for remat in POLICIES)
    assert dots["mm"] == none["mm"] < block["mm"]
    assert none["bmm"] < dots["bmm"] <= block["bmm"]
    assert none["rsqrt"] < dots["rsqrt"] == block["rsqrt"]


def test_dots_run_no_fused_attention_again() -> None:
    """The fused kernel's output is kept."""
    config = tiny()
    none, dots, block = (gradients(config, remat, attention="sdpa")[1] for remat in POLICIES)
    fused = next(name for name in none if name.startswith("_scaled_dot_product") and "backward" not in name)
    assert dots[fused] == none[fused] < block[fused]
