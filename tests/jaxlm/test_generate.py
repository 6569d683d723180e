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
from hlo import bytes_read
from tolerances import tolerance

from jaxlm import cached
from jaxlm import generate as decoding
from jaxlm.attention import init_cache
from jaxlm.cached import decode_step, prefill, select_rows
from jaxlm.config import ConfigError, ModelConfig, RopeScaling
from jaxlm.generate import decode, stream
from jaxlm.logits import gumbel
from jaxlm.model import Split, abstract_model, merge_model
from jaxlm.presets import PRESETS
from jaxlm.sampling import Sampling

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


def generate(model: Split, prompts: list[list[int]], settings: Sampling) -> list[list[int]]:
    """The ids of the one answer to each prompt."""
    return [best.ids for (best,) in decode(model, prompts, settings)]


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
    answers = generate(model, prompts, Sampling(STEPS, greedy=True))
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
    """Other prompts, lengths, seeds and temperatures (whole numbers too) compile nothing; another bucket does."""
    generate(plain, [[1, 2, 3]], dataclasses.replace(SAMPLED, temperature=0.7))
    run = {}
    for module in (cached, decoding):
        run |= module._compiled(plain.graphdef)._asdict()
    before = [function._cache_size() for function in run.values()]
    generate(plain, [[4, 5, 6, 7, 8, 9, 10]], dataclasses.replace(SAMPLED, max_new_tokens=15, seed=2))
    whole = dataclasses.replace(SAMPLED)
    object.__setattr__(whole, "temperature", 2)  # what a user may write; types are checked in tests only
    generate(plain, [[1, 2, 3]], whole)
    assert [function._cache_size() for function in run.values()] == before
    generate(plain, [list(range(17))], dataclasses.replace(SAMPLED, max_new_tokens=15))
    after = [function._cache_size() for function in run.values()]
    changed = [name for name, a, b in zip(run, after, before) if a != b]
    assert changed == ["prefill"]


def test_a_stop_id_ends_its_row_only(plain: Split) -> None:
    """The stop id is not part of the answer, and the other rows go on."""
    prompts = prompts_for(PLAIN)
    free = generate(plain, prompts, SAMPLED)
    stop = free[0][4]
    stopped = generate(plain, prompts, dataclasses.replace(SAMPLED, stop=(stop,)))
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert max(map(len, stopped)) > 4


def test_several_samples_are_the_rows_of_repeated_prompts(plain: Split) -> None:
    """Sample s of prompt p is answer number p * samples + s, as if the prompt stood there that often."""
    prompts = prompts_for(PLAIN)
    several = decode(plain, prompts, dataclasses.replace(SAMPLED, samples=2))
    repeated = generate(plain, [p for p in prompts for _ in range(2)], SAMPLED)
    assert [answer.ids for of_one in several for answer in of_one] == repeated
    assert len({tuple(row) for row in repeated}) == 6


def test_log_probabilities_are_the_full_forwards(plain: Split) -> None:
    """Of each chosen token under the model's own softmax, whatever the temperature; the stop id has none."""
    prompts, settings = prompts_for(PLAIN), dataclasses.replace(SAMPLED, logprobs=True)
    full = jax.jit(lambda params, ids: merge_model(plain.graphdef, params)(ids)[0])
    for prompt, (answer,) in zip(prompts, decode(plain, prompts, settings)):
        assert answer.finish == "length" and len(answer.logprobs) == len(answer.ids) == 20
        logits = np.asarray(full(plain.params, np.asarray([prompt + answer.ids]))[0], np.float64)
        expected = (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[len(prompt) - 1 : -1]
        assert relative_error(answer.logprobs, expected[range(20), answer.ids]) < tolerance("f32_decode")
    first = decode(plain, prompts, settings)[0][0].ids
    (stopped,) = decode(plain, prompts, dataclasses.replace(settings, stop=(first[4],)))[0]
    assert stopped.finish == "stop" and len(stopped.logprobs) == len(stopped.ids) == first.index(first[4])


def test_a_caller_ends_rows(plain: Split) -> None:
    """`ended` sees each row's ids so far and ends it; the others go on, and nothing is asked of a row that is over."""
    prompts, seen = prompts_for(PLAIN), []

    def ended(row: int, ids: list[int]) -> bool:
        seen.append(row)
        return row == 1 and len(ids) >= 3

    answers = [best for (best,) in decode(plain, prompts, SAMPLED, ended=ended)]
    free = generate(plain, prompts, SAMPLED)
    assert [answer.finish for answer in answers] == ["length", "stop", "length"]
    assert answers[0].ids == free[0] and answers[1].ids == free[1][: len(answers[1].ids)]
    assert seen.count(1) < seen.count(0)


def test_rows_are_picked_and_repeated(plain: Split) -> None:
    """After `select_rows` each row decodes as the one it was taken from."""
    prompts, tokens = prompts_for(PLAIN), jnp.array([5, 6, 7])
    _, state = prefill(plain, prompts, 16)
    picked = select_rows(state, jnp.array([2, 0, 0, 1]))
    logits, _ = decode_step(plain, tokens, state)
    again, after = decode_step(plain, tokens[jnp.array([2, 0, 0, 1])], picked)
    assert relative_error(again, logits[jnp.array([2, 0, 0, 1])]) < tolerance("f32_decode")
    assert after.positions.tolist() == [8, 12, 12, 4]


@pytest.mark.parametrize("name", ["dense-tied-llama3", "moe-windows-yarn"])
def test_a_long_prompt_is_read_in_chunks(name: str, x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks shorter than the window, than the padding, and with a rest: the logits of one piece."""
    monkeypatch.setattr(cached, "SMALLEST_BUCKET", 2)
    model, prompts = split(CASES[name], np.float64), prompts_for(CASES[name], (23, 5, 12))
    tokens, found = jnp.array([1, 2, 3]), {}
    for chunk in (512, 2, 8):
        monkeypatch.setattr(cached, "CHUNK", chunk)
        logits, state = prefill(model, prompts, 27)
        found[chunk] = [logits]
        for _ in range(4):
            logits, state = decode_step(model, tokens, state)
            found[chunk].append(logits)
        assert int(state.cache.length) == state.length == 27
    for chunk in (2, 8):
        for whole, parts in zip(found[512], found[chunk], strict=True):
            assert relative_error(parts, whole) < tolerance("f64_decode")


def test_the_last_chunk_ends_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the context is no multiple of the bucket, the last chunk is narrower than it and overwrites nothing."""
    monkeypatch.setattr(cached, "SMALLEST_BUCKET", 8)
    monkeypatch.setattr(cached, "CHUNK", 8)
    model = split(dataclasses.replace(PLAIN, context=20))
    (prompt,) = prompts_for(PLAIN, (18,))
    full = jax.jit(lambda params, ids: merge_model(model.graphdef, params)(ids)[0])
    logits, state = prefill(model, [prompt, prompt[:3]], 20)
    assert relative_error(logits[0], full(model.params, np.asarray([prompt]))[0, -1]) < tolerance(
        "f32_decode"
    )
    assert state.cache.segment.sum(axis=1).tolist() == [18, 3]


def test_half_precision_is_chosen_from_in_float32_with_the_noise_of_each_answer() -> None:
    """A bfloat16 model: the seed's noise is float32 `gumbel` of the answer's number, whatever group it is made in."""
    model, prompts = split(CASES["learned-bias-table"], jnp.bfloat16), [[5, 6, 7], [8, 9]]
    settings = Sampling(STEPS, samples=2, seed=3, logprobs=True)
    answers = decode(model, prompts, settings)
    draw = jax.jit(gumbel, static_argnums=(3, 4))
    noise = jnp.stack([draw(3, step, jnp.arange(4), V, jnp.float32) for step in range(STEPS)])
    assert decode(model, prompts, settings, noise) == answers
    assert decode(model, prompts[1:], settings, noise[:, 2:]) == answers[1:], "numbered across the groups"
    logprobs = np.float32([answer.logprobs for of_one in answers for answer in of_one])
    assert (logprobs != logprobs.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9, (
        "rounded to half precision"
    )
    logits, state = prefill(model, prompts[:1], 8)
    assert {logits.dtype, *(x.dtype for layer in state.cache.layers for x in layer)} == {
        jnp.dtype("bfloat16")
    }


def test_a_burst_takes_the_cache_that_it_is_given(plain: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens are made in a loop on the device, there is one cache, not two."""
    states = []

    def kept(*arguments: Any) -> Any:
        logits, state = prefill(*arguments)
        states.append(state)
        return logits, state

    monkeypatch.setattr(decoding, "prefill", kept)
    generate(plain, [[1, 2, 3]], SAMPLED)
    (state,) = states
    assert all(x.is_deleted() for layer in state.cache.layers for x in layer)


def test_a_windowed_layer_remembers_its_window_only() -> None:
    """The ring of a layer has as many slots as its window, whatever the length."""
    model = split(CASES["moe-windows-yarn"])
    _, state = prefill(model, [[1] * 20], 32)
    assert [layer.k.shape[2] for layer in state.cache.layers] == [4, 32]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1] * 30], {}, "30 tokens and 12 new ones exceed the model's context of 32.*at most 2"),
        ([[1] * 40], {}, "exceed the model's context of 32; shorten the prompt$"),
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, V]], {}, f"id {V}, outside the vocabulary of {V}"),
        ([[-1]], {}, "id -1"),
        ([[1]], {"temperature": 0.0}, "temperature=0.0 must be finite and above 0; greedy"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"top_k": -2}, "top_k=-2"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ([[1]], {"top_p": 1.01}, "top_p=1.01"),
        ([[1]], {"min_p": -0.1}, "min_p=-0.1"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ([[1]], {"presence_penalty": float("inf")}, "presence_penalty=inf"),
        ([[1]], {"presence_penalty": -1e300}, "presence_penalty=-1e\\+300"),
        ([[1]], {"temperature": 1e-300}, "temperature=1e-300"),
        ([[1]], {"length_penalty": 1e5, "num_beams": 2}, "length_penalty=100000.0 must be finite, and 12 to"),
        ([[1]], {"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
        ([[1]], {"num_beams": 2, "temperature": 0.7}, "num_beams=2 .* temperature=0.7 contradicts it"),
        ([[1]], {"num_beams": 2, "top_k": 5}, "num_beams=2 .* top_k=5 contradicts it"),
        ([[1]], {"num_beams": 2, "samples": 3}, "samples=3 must not exceed num_beams=2"),
        ([[1]], {"greedy": True, "samples": 2}, "samples=2 .* all be the same"),
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


def test_the_cache_is_donated_and_written_in_place(plain: Split) -> None:
    """The compiled step returns the buffers of the cache it was given, and makes no second one."""
    _, state = prefill(plain, [[1, 2, 3]], 32)
    tokens = jnp.zeros(1, jnp.int32)
    step = cached._compiled(plain.graphdef).step
    memory = step.lower(plain.params, state.cache, tokens, state.positions).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= size
    decode_step(plain, tokens, state)
    assert state.cache.layers[0].k.is_deleted()


def test_a_step_reads_the_chosen_experts_only() -> None:
    """The whole compiled step of a mixture, one row: A of E experts in every layer, and no tenth more."""
    config = PRESETS["quickstart"].config.model
    graphdef, shapes, _ = abstract_model(config)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 64, jnp.float32))
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(functools.partial(cached.step, graphdef))
    text = step.lower(shapes, cache, row, row).compile().as_text()
    stacks = [shape for path, shape in shapes.items() if ".experts." in path]
    every = sum(shape.size * shape.dtype.itemsize for shape in stacks)
    share = config.moe.n_active / config.moe.n_experts
    assert share * every <= bytes_read(text, {shape.shape for shape in stacks}) <= 1.1 * share * every
