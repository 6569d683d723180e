"""Decoding beside transformers' `generate`: the same weights, prompts and tokens, interleaved in one run."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert.targets import open_target  # noqa: E402
from jaxlm import cached  # noqa: E402
from jaxlm.config import ModelConfig  # noqa: E402
from jaxlm.generate import decode  # noqa: E402
from jaxlm.model import Split, abstract_model, init_params  # noqa: E402
from jaxlm.presets import PRESETS  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.bench]

NEW, PROMPT = 128, 32
SHAPES = {
    "quickstart": (PRESETS["quickstart"].config.model, 2.0, 5),  # limit: times transformers' speed; rounds
    "llama-1.1b, 4 layers": (dataclasses.replace(PRESETS["llama-1.1b"].config.model, n_layers=4), 1.5, 3),
}


def their_model(config: ModelConfig) -> Any:
    """A random model of transformers in the shape of a config."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
    }
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.moe.n_experts:
        mixture = {"num_local_experts": config.moe.n_experts, "num_experts_per_tok": config.moe.n_active}
        made = transformers.MixtralConfig(**sizes, **mixture, rope_parameters=rope)
        return transformers.MixtralForCausalLM(made).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).eval()


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_faster_than_transformers(name: str, tmp_path: Path) -> None:
    """128 greedy tokens after prompts of 32, float32: medians of interleaved ratios, compile time apart."""
    config, limit, rounds = SHAPES[name]
    torch.manual_seed(0)
    theirs = their_model(config)
    theirs.save_pretrained(tmp_path)
    target = open_target(tmp_path)
    model = Split(abstract_model(target.config).graphdef, target.params)
    for batch in (1, 8):
        ids = np.random.default_rng(0).integers(1, config.vocab_size, (batch, PROMPT))
        settings = Sampling(NEW, greedy=True)
        tensor = torch.from_numpy(ids)
        arguments = {"attention_mask": torch.ones_like(tensor), "max_new_tokens": NEW, "min_new_tokens": NEW}
        ours = functools.partial(decode, model, ids.tolist(), settings)
        other = functools.partial(theirs.generate, tensor, do_sample=False, pad_token_id=0, **arguments)
        first = seconds(ours), seconds(other)
        times = [(seconds(ours), seconds(other)) for _ in range(rounds)]
        ratio = statistics.median(b / a for a, b in times)
        mine, hers = (batch * NEW / statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"\n{name}, batch {batch}: jaxlm {mine:,.0f} tokens/s, transformers {hers:,.0f}, "
            f"{ratio:.2f} times; first call {first[0]:.1f} s and {first[1]:.1f} s"
        )
        assert ratio >= limit


def test_a_longer_bucket_costs_more_not_less() -> None:
    """Time of a token in a cache of 256 slots against one of 1,024, interleaved: at most the same."""
    config = PRESETS["quickstart"].config.model
    model = Split(abstract_model(config).graphdef, init_params(config, 0))
    prompt, states = [list(range(1, PROMPT + 1))] * 8, {}
    for slots in (256, 1024):
        _, states[slots] = cached.prefill(model, prompt, slots)
    tokens = jnp.zeros(8, jnp.int32)

    def steps(slots: int) -> None:
        logits, state = None, states[slots]
        for _ in range(20):
            logits, state = cached.decode_step(model, tokens, state)
        jax.block_until_ready(logits)
        states[slots] = state

    times = [(seconds(lambda: steps(256)), seconds(lambda: steps(1024))) for _ in range(10)][1:]
    short, long = (statistics.median(column) / 20 * 1e3 for column in zip(*times, strict=True))
    print(f"\nquickstart, batch 8: {short:.2f} ms a token in 256 slots, {long:.2f} ms in 1,024")
    assert short <= long
