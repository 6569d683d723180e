"""Decoding in jaxlm: the cache against the full forward, sampling against the softmax, what is refused."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, V, random_params, relative_error, tiny
from tolerances import tolerance

from jaxlm import generate as decoding
from jaxlm.config import ConfigError, ModelConfig, RopeScaling
from jaxlm.generate import Sampling, choose, decode_step, generate, gumbel, prefill, stream
from jaxlm.model import Split, abstract_model, merge_model

STEPS = 5
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=16, low_freq_factor=1.5, high_freq_factor=5.0)
YARN = RopeScaling("yarn", factor=4.0, original_context=8)
CASES: dict[str, ModelConfig] = {
    "dense-tied-llama3": tiny(
        init="fan_in", n_layers=1, tied=True, head_bias=True, qk_norm=True, rope_scaling=LLAMA3
    ),
    "moe-windows-yarn": tiny({"capacity_factor": 0.5}, init="fan_in", windows=(4, 0), rope_scaling=YARN),
    "learned-bias-table": tiny(
        init="fan_in", n_layers=1, position="learned", attn_bias_table=True, mlp="gelu_erf"
    ),
}
PLAIN = tiny(init="fan_in", n_layers=1)
SAMPLED = Sampling(20, temperature=1.0, top_k=20, seed=7)  # one for all tests of a kind: it is compiled once


def split(config: ModelConfig, dtype: Any = np.float32) -> Split:
    """A model with random weights, wide enough that its choices differ from token to token."""
    params = {path: jnp.asarray(value) for path, value in random_params(config, dtype=dtype).items()}
    return Split(abstract_model(config).graphdef, params)


def prompts_for(config: ModelConfig, lengths: tuple[int, ...] = (11, 3, 7)) -> list[list[int]]:
    """Random prompts; of one length where a bias table does not allow padding."""
    rng = np.random.default_rng(1)
    lengths = (lengths[0],) * len(lengths) if config.attn_bias_table else lengths
    return [rng.integers(0, V, n).tolist() for n in lengths]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


@pytest.fixture(scope="module")
def plain() -> Split:
    """One float32 model for the tests that need no other."""
    return split(PLAIN)


def cached_against_full(config: ModelConfig, dtype: Any) -> float:
    """Largest error over rows and positions: prefill and steps with a cache against one forward without."""
    model, prompts = split(config, dtype), prompts_for(config)
    lengths, longest = np.array([len(p) for p in prompts]), max(map(len, prompts))
    rest = np.random.default_rng(2).integers(0, V, (STEPS, len(prompts))).astype(np.int32)
    ids = np.zeros((len(prompts), longest + STEPS), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt) + STEPS] = prompt + rest[:, row].tolist()
    # What stands on the right of a token cannot reach it, so rows of the full forward need no padding rules.
    full = jax.jit(lambda params, ids: merge_model(model.graphdef, params)(ids)[0])(model.params, ids)
    logits, state = prefill(model, prompts, longest + STEPS)
    rows = np.arange(len(prompts))
    errors = [relative_error(logits, full[rows, lengths - 1])]
    for step, tokens in enumerate(rest):
        logits, state = decode_step(model, jnp.asarray(tokens), state)
        errors.append(relative_error(logits, full[rows, lengths + step]))
    return max(errors)


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_is_the_full_forward(name: str, x64: None) -> None:
    """float64, unequal rows padded on the left: the logits of every new position."""
    assert cached_against_full(CASES[name], np.float64) < tolerance("f64_decode")


def test_cached_decoding_in_float32() -> None:
    """The same in float32, within rounding."""
    assert cached_against_full(CASES["dense-tied-llama3"], np.float32) < tolerance("f32_decode")


def test_generate_with_a_bias_table_takes_unequal_prompts() -> None:
    """Rows of a table indexed by slot are decoded by length; every id is the full forward's argmax."""
    model, prompts = split(CASES["learned-bias-table"]), [[5, 6, 7], [8, 9, 10, 11, 12]]
    answers = generate(model, prompts, Sampling(STEPS, temperature=0.0))
    full = jax.jit(lambda params, ids: merge_model(model.graphdef, params)(ids)[0])
    for prompt, answer in zip(prompts, answers):
        ids = np.zeros((1, 10), np.int32)
        ids[0, : len(prompt) + STEPS] = prompt + answer
        best = np.argmax(full(model.params, ids)[0], -1)
        assert answer == best[len(prompt) - 1 : len(prompt) + STEPS - 1].tolist()
    with pytest.raises(ConfigError, match="prompts of one length"):
        prefill(model, prompts, 8)


def test_a_seed_reproduces_and_rows_do_not_mix(plain: Split) -> None:
    """An answer depends on prompt, seed and row only: not on its neighbours, the padding, or the burst."""
    settings, prompts = SAMPLED, prompts_for(PLAIN)
    answers = generate(plain, prompts, settings)
    assert generate(plain, prompts, settings) == answers
    assert generate(plain, [prompts[0], [1], [2]], settings)[0] == answers[0]
    assert list(stream(plain, prompts[0], settings)) == answers[0]
    assert generate(plain, prompts, dataclasses.replace(settings, seed=8)) != answers
    twins = generate(plain, [prompts[0]] * 3, settings)
    assert twins[0] == answers[0] and len({tuple(a) for a in twins}) == 3


def test_one_compilation_serves_a_bucket(plain: Split) -> None:
    """Other prompts, lengths, seeds and temperatures of the same bucket compile nothing; another bucket does."""
    generate(plain, [[1, 2, 3]], dataclasses.replace(SAMPLED, temperature=0.7))
    run = decoding._compiled(plain.graphdef)
    before = [function._cache_size() for function in run]
    generate(plain, [[4, 5, 6, 7, 8, 9, 10]], dataclasses.replace(SAMPLED, max_new_tokens=15, seed=2))
    assert [function._cache_size() for function in run] == before
    generate(plain, [list(range(17))], dataclasses.replace(SAMPLED, max_new_tokens=15))
    assert run.prefill._cache_size() == before[0] + 1 and run.burst._cache_size() == before[2]


def test_a_stop_id_ends_its_row_only(plain: Split) -> None:
    """The stop id is not part of the answer, and the other rows go on."""
    prompts = prompts_for(PLAIN)
    free = generate(plain, prompts, SAMPLED)
    stop = free[0][4]
    stopped = generate(plain, prompts, dataclasses.replace(SAMPLED, stop=(stop,)))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert max(map(len, stopped)) > 4


@pytest.mark.parametrize("top_k", [0, 3])
def test_choose_samples_the_softmax(top_k: int) -> None:
    """Frequencies of 40,000 draws follow softmax(logits / temperature) of the top k, within five sigmas."""
    logits, n = np.array([0.3, 2.0, -1.0, 1.1, 0.0, -3.0, 1.7], np.float32), 40_000
    noise = gumbel(3, 0, jnp.arange(n), len(logits), jnp.float32)
    ids = choose(jnp.broadcast_to(logits, (n, len(logits))), Sampling(temperature=0.8, top_k=top_k), noise)
    p = np.exp(logits.astype(float) / 0.8)
    p[np.argsort(-logits)[top_k or len(logits) :]] = 0
    p /= p.sum()
    error = np.abs(np.bincount(ids, minlength=len(logits)) / n - p)
    assert np.all(error <= tolerance("sigmas") * np.sqrt(p * (1 - p) / n))


def test_choose_greedy_takes_the_lowest_of_equals() -> None:
    """Exact ties go to the lowest id, and noise plays no part."""
    logits = jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    assert choose(logits, Sampling(temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1] * 30], {}, "30 tokens and 12 new ones exceed the model's context of 32.*at most 2"),
        ([[1] * 40], {}, "at most 0"),
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, V]], {}, f"id {V}, outside the vocabulary of {V}"),
        ([[-1]], {}, "id -1"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"top_k": -2}, "top_k=-2"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_refuses(plain: Split, prompts: list[list[int]], changes: dict[str, Any], message: str) -> None:
    """One line with the numbers, before anything is computed."""
    with pytest.raises(ConfigError, match=message) as caught:
        generate(plain, prompts, Sampling(**({"max_new_tokens": 12} | changes)))
    assert "\n" not in str(caught.value)


def test_the_last_slot_is_usable_and_no_more(plain: Split) -> None:
    """A prompt and an answer may fill the context exactly; a full cache is refused."""
    assert len(generate(plain, [[1] * 20], dataclasses.replace(SAMPLED, max_new_tokens=12))[0]) == 12
    logits, state = prefill(plain, [[1] * 31], 32)
    _, state = decode_step(plain, jnp.argmax(logits, -1), state)
    with pytest.raises(ConfigError, match="cache of 32 slots"):
        decode_step(plain, jnp.argmax(logits, -1), state)
