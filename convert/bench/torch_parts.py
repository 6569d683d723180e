"""What a fair PyTorch side needs beyond a reference that is written to be read: kernels, a fused head, decoding.

Everything computes what torchref computes; the benchmark checks so before it times anything.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convert.native import pairs
from convert.rules import TRANSPOSE
from jaxlm.config import ModelConfig
from torchref.layers import Backends, apply_rope
from torchref.model import Decoder

FULL_LOGITS = (
    2**26
)  # up to so many, all logits at once are the fastest: the compiler fuses the loss with them
HEAD_CHUNK = 8_192  # tokens


def device() -> torch.device:
    """The GPU if jax computes on one, else the CPU."""
    return torch.device("cuda" if jax.devices()[0].platform == "gpu" else "cpu")


def wait() -> None:
    """Until everything that was started on a GPU is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def attention_kernels() -> contextlib.AbstractContextManager[Any]:
    """On CUDA cuDNN's fused attention first, then flash; elsewhere torch has one choice."""
    if device().type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return sdpa_kernel([*order, SDPBackend.MATH], set_priority=True)


def to_torch(x: jax.Array | np.ndarray) -> Tensor:
    """An array as a tensor of its own on the same device; between GPUs' frameworks without a way over the host."""
    if isinstance(x, jax.Array) and x.devices() and next(iter(x.devices())).platform == "gpu":
        return torch.from_dlpack(x).clone()
    from convert.tree import to_tensor

    return to_tensor(np.asarray(x)).to(device())


def twin(
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    experts: str = "loop",
    dtype: torch.dtype | None = None,
) -> Decoder:
    """torchref with jaxlm's weights, by the table of `convert.native`, tensor by tensor on the device.

    dtype: of all weights; None = as they are.
    """
    choice: Any = experts
    with torch.device("meta"):
        model = Decoder(config, Backends(experts=choice), rngs=None, dtype=torch.float32)
    state = {}
    for pair in pairs(config):
        value = to_torch(params[pair.path])
        value = value if dtype is None else value.to(dtype)
        state[pair.other] = value.mT.contiguous() if pair.transform is TRANSPOSE else value
    model.load_state_dict(state, strict=True, assign=True)
    return model


def outside_of_graphs(module: torch.nn.Module) -> None:
    """Makes the compiler step over what it cannot trace: loops over experts, `_grouped_mm` in float32."""
    module.forward = torch.compiler.disable(module.forward)


class FusedHead(torch.autograd.Function):
    """Summed cross-entropy of chunks of tokens, with the gradients formed on the way: no logit is made twice.

    hidden [P, D], weight [V, D], targets [P], mask [P]; the gradient of the weight is summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, chunk: int
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
        for part in range(0, len(hidden), chunk):
            x = hidden[part : part + chunk]
            total, grad = _loss_and_gradient(
                x @ weight.T, targets[part : part + chunk], mask[part : part + chunk]
            )
            loss += total
            d_hidden[part : part + chunk] = grad @ weight
            d_weight += grad.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass times that of the loss."""
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * grads[0]).to(d_hidden.dtype), (d_weight * grads[0]).to(ctx.dtype), None, None, None


@torch.compile(dynamic=False)
def _loss_and_gradient(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and d loss / d logits, in the logits' dtype."""
    wide = logits.float()
    log_z = wide.logsumexp(-1, keepdim=True)
    hit = torch.arange(wide.shape[-1], device=wide.device)[None] == targets[:, None]
    loss = ((log_z[:, 0] - (wide * hit).sum(-1)) * mask).sum()
    grad = ((wide - log_z).exp() - hit.to(wide.dtype)) * mask[:, None]
    return loss, grad.to(logits.dtype)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, chunk: int = HEAD_CHUNK
) -> Tensor:
    """Summed cross-entropy of hidden [B, T, D] under a head [V, D]: all logits at once where they are few."""
    rows = hidden.flatten(0, 1)
    if rows.shape[0] * weight.shape[0] > FULL_LOGITS:
        return FusedHead.apply(rows, weight, targets.flatten(), mask.flatten(), chunk)
    return (
        F.cross_entropy((rows @ weight.T).float(), targets.flatten(), reduction="none")
        .mul(mask.flatten())
        .sum()
    )


class StaticDecoder:
    """Decoding with a cache of fixed size and positions on the device, so that one compiled graph serves every token.

    The way of gpt-fast: torchref's own decoding reads lengths on the host, which a GPU waits for. Greedy, one document
    per row, prompts of one length; experts by gathered weights.
    """

    def __init__(self, model: Decoder, batch: int, slots: int, compiled: bool = True):
        config, place = model.config, device()
        self.model, self.slots = model, slots
        shape = (batch, config.n_kv_heads, slots, config.head_dim)
        dtype = model.embed.weight.dtype
        self.cache = [
            tuple(torch.zeros(shape, dtype=dtype, device=place) for _ in range(2)) for _ in model.blocks
        ]
        self.index = torch.arange(slots, device=place)
        mode = "reduce-overhead" if place.type == "cuda" else None
        self.compiled = compiled
        self._read: Callable[..., Tensor] = self._logits
        self._choose: Callable[..., Tensor] = self._next
        if compiled:
            self._read = torch.compile(self._logits, dynamic=False)
            self._choose = torch.compile(self._next, mode=mode, dynamic=False)

    @torch.no_grad()
    def read(self, ids: Tensor, start: int = 0) -> Tensor:
        """The logits [B, V] of what follows ids [B, T], which stand in the slots from `start` on."""
        with attention_kernels():
            return self._read(ids, self.index[start : start + ids.shape[1]], start == 0)

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """`count` greedy tokens [B, count] after prompts [B, T]."""
        width = ids.shape[1]
        token = self.read(ids).argmax(-1)
        made = [token]
        for i in range(count - 1):
            if self.compiled and ids.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            token = self._choose(token[:, None], self.index[width + i : width + i + 1]).clone()
            made.append(token)
        return torch.stack(made, dim=1)

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self._logits(ids, positions).argmax(-1)

    def _logits(self, ids: Tensor, positions: Tensor, first: bool = False) -> Tensor:
        """Reads ids [B, T] at positions [T]: the logits of what follows [B, V]. first: nothing stands before them."""
        model: Any = self.model
        x = model.embed(ids)
        if model.pos_embed is not None:
            x = x + model.pos_embed(positions)[None]
        rope = model._rope(positions[None], x.dtype)
        for block, cache in zip(model.blocks, self.cache):
            x = x + self._attention(block.attn, block.attn_norm(x), rope, positions, cache, first)
            normed = block.mlp_norm(x)
            x = x + (block.mlp(normed) if block.moe is None else self._experts(block.moe, normed))
        weight, bias = model.head()
        logits = model.final_norm(x[:, -1]) @ weight
        return logits if bias is None else logits + bias

    def _attention(
        self, layer: Any, x: Tensor, rope: Any, positions: Tensor, cache: Any, first: bool
    ) -> Tensor:
        B, T, _ = x.shape
        q = layer.q_proj(x).view(B, T, layer.n_heads, layer.head_dim)
        k = layer.k_proj(x).view(B, T, layer.n_kv_heads, layer.head_dim)
        v = layer.v_proj(x).view(B, T, layer.n_kv_heads, layer.head_dim)
        if layer.q_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        for old, new in zip(cache, (k, v)):
            old.index_copy_(2, positions, new.transpose(1, 2))
        if first and not 0 < layer.window < T:  # without a mask the fused kernels skip what nobody sees
            query, key, value = (part.transpose(1, 2) for part in (q, k, v))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return layer.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        distance = positions[:, None] - self.index[None]
        mask = (distance >= 0) & (distance < layer.window) if layer.window else distance >= 0
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), *cache, attn_mask=mask[None, None], enable_gqa=True
        )
        return layer.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def _experts(self, layer: Any, x: Tensor) -> Tensor:
        """Few tokens: their experts' weights are gathered; many: the layer as it is."""
        if x.shape[1] > 1 or layer.shared is not None or layer.experts.gate_up is None:
            return layer(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), False)[0]
        routing = layer.routing(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), False)
        ids, weights = routing.ids[:, 0], routing.weights[:, 0].to(x.dtype)
        hidden = torch.einsum("bd,baud->bau", x[:, 0], layer.experts.gate_up[ids])
        gate, up = hidden.chunk(2, dim=-1)
        out = torch.einsum("baf,badf->bad", F.silu(gate) * up, layer.experts.down[ids])
        return (out * weights[..., None]).sum(1)[:, None]
