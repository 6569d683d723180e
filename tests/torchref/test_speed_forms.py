"""What makes PyTorch fast computes the same: grouped experts, steps that compile whole, a fused head, decoding."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch")

from convert.bench.torch_parts import FusedHead, StaticDecoder  # noqa: E402
from jaxlm.config import ModelConfig  # noqa: E402
from jaxlm.presets import preset  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402
from torchref.generate import decode  # noqa: E402
from torchref.layers import Backends  # noqa: E402
from torchref.model import Decoder  # noqa: E402
from torchref.moe import MoE  # noqa: E402

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]


def small(moe: bool, **changes) -> ModelConfig:
    """Two layers of a quickstart model."""
    model = preset("quickstart" if moe else "quickstart-dense").model
    sizes = {
        "n_layers": 2,
        "d_model": 48,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "d_ff": 64,
    }
    mixture = dataclasses.replace(model.moe, d_ff=32, expert_bias=True) if moe else model.moe
    return dataclasses.replace(model, **sizes, context=128, moe=mixture, **changes)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("mlp", ["swiglu", "gelu_erf"])
def test_grouped_experts_are_the_loop(mlp: str) -> None:
    """Output and every gradient of a layer with biases and an expert that nobody chose."""
    config, found = small(True, mlp=mlp), {}
    x = torch.randn(2, 33, 48, generator=torch.Generator().manual_seed(1))
    for experts in ("loop", "grouped"):
        layer = MoE(
            config, Backends(experts=experts), rngs=torch.Generator().manual_seed(0), dtype=torch.float32
        )
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if name.endswith("bias"):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
            layer.router.weight[3] = 0  # never among the best two of eight, with what follows
            layer.router.weight[:3] += 0.5
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf, torch.ones(2, 33, dtype=torch.bool), True)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        found[experts] = {"out": out.detach(), "x": leaf.grad} | grads
    for name, value in found["loop"].items():
        assert distance(found["grouped"][name], value) < tolerance("f32_reordered"), name


WHOLE = """
import dataclasses, torch
from jaxlm.presets import preset
from torchref.layers import Backends
from torchref.model import Decoder
from torchref.moe import balance_loss
for name, dtype in (("quickstart-dense", torch.float32), ("quickstart", torch.bfloat16)):
    config = dataclasses.replace(preset(name).model, n_layers=1, d_model=48, n_heads=3, n_kv_heads=1, head_dim=16)
    model = Decoder(config, Backends(experts="grouped"), rngs=torch.Generator().manual_seed(0)).to(dtype)
    ids = torch.arange(64).view(2, 32)
    def loss(ids):
        hidden, acts, _ = model.hidden(ids)
        total = hidden.float().square().sum()
        if config.moe.n_experts:
            valid = torch.ones_like(ids, dtype=torch.bool)
            logits, chosen = acts["blocks.0.moe.router_logits"], acts["blocks.0.moe.expert_ids"]
            total = total + balance_loss("mixtral", [logits], [chosen], valid)
        return total
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        print(float((whole(ids) - loss(ids)).abs() / loss(ids)))
"""


def test_the_reference_compiles_without_a_break() -> None:
    """One graph from ids to hidden states and balance loss, RoPE table included; experts in half precision.

    In a process whose functions are not wrapped by the checks of their shapes, which cannot be traced.
    """
    command = [sys.executable, "-c", WHOLE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert all(float(error) < tolerance("f32_reordered") for error in result.stdout.split())
    assert len(result.stdout.split()) == 2


def test_fused_head_is_the_plain_loss() -> None:
    """Loss and both gradients, in chunks that do not divide the tokens, with a ragged mask."""
    rng = np.random.default_rng(0)
    hidden, weight = (
        torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((70, 16), (50, 16))
    )
    targets = torch.from_numpy(rng.integers(0, 50, 70))
    mask = torch.from_numpy(rng.random(70).astype(np.float32))
    found = []
    for fused in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            with torch.compiler.set_stance("force_eager"):
                loss = FusedHead.apply(x, w, targets, mask, 32)
        else:
            loss = (torch.nn.functional.cross_entropy(x @ w.T, targets, reduction="none") * mask).sum()
        (3 * loss).backward()
        found.append((loss.detach(), x.grad, w.grad))
    assert all(distance(b, a) < tolerance("f32_reordered") for a, b in zip(*found))


@pytest.mark.parametrize("moe", [False, True])
def test_static_decoding_is_the_references(moe: bool) -> None:
    """The greedy tokens of torchref's own decoding, windowed layers included."""
    model = Decoder(small(moe, windows=(0, 8)), rngs=torch.Generator().manual_seed(0)).eval()
    if moe:
        for block in model.blocks:
            assert block.moe is not None
            for name in ("gate_up_bias", "down_bias"):
                setattr(block.moe.experts, name, None)  # decoding by gathered weights knows no biases
    prompts = np.random.default_rng(0).integers(1, 320, (2, 12))
    expected = decode(model, prompts.tolist(), Sampling(10, greedy=True))
    decoder = StaticDecoder(model, 2, 24, compiled=False)
    assert decoder.generate(torch.from_numpy(prompts), 10).tolist() == [
        answers[0].ids for answers in expected
    ]
