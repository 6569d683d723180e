"""The choice of the next token in both frameworks against transformers' own logits processors."""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import float64, quick_jit  # noqa: E402
from scipy import stats  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.logits  # noqa: E402
import torchref.logits  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.torch

ROWS, V, PROMPT, ANSWER = 1000, 33, 7, 9
TEMPERATURES = [0.7, 1.3, 1e-30, 1e-4, 1e4]
# What each setting may be; no value puts a border exactly on a probability.
CHOICES: dict[str, list[Any]] = {
    "repetition_penalty": [1.3, 0.6],
    "presence_penalty": [0.7, -0.4],
    "frequency_penalty": [0.45, -1.1],
    "no_repeat_ngram": [1, 2, 3, 5],
    "temperature": TEMPERATURES,
    "top_k": [1, 4, 20, V, 2 * V],
    "top_p": [0.8731, 0.31, 0.9993, 1e-9, 1e-20],
    "min_p": [0.0613, 0.517, 1.0, 1e-7],
}


def logits_of(dtype: Any) -> np.ndarray:
    """Rows of every kind: generic, tied, with infinities, NaN, all equal, huge, tiny, signed zeros."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, V)) * 3
    kind = np.arange(ROWS) % 10
    x[kind == 1] = x[kind == 1].round()
    x[kind == 2] = (x[kind == 2] / 4).round()
    x[kind == 3] = np.where(rng.random(x[kind == 3].shape) < 0.6, -np.inf, x[kind == 3])
    x[kind == 4] = np.where(rng.random(x[kind == 4].shape) < 0.04, np.inf, x[kind == 4])
    x[kind == 5] = np.where(rng.random(x[kind == 5].shape) < 0.04, np.nan, x[kind == 5])
    x[kind == 6] *= 1e30
    x[kind == 7] *= 1e-30
    x[kind == 8] = np.where(rng.random(x[kind == 8].shape) < 0.5, 0.0, -0.0)
    x[9] = -np.inf
    x[19] = 2.5
    x[29] = np.copysign(np.nan, -1)
    return x.astype(dtype)


@functools.cache
def rows_of_ids() -> tuple[list[list[int]], np.ndarray]:
    """Unequal prompts and equal answers of few ids, so that runs come again."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 5, rng.integers(1, PROMPT + 1)).tolist() for _ in range(ROWS)]
    prompts[0] = [1, 2] * 3 + [1]
    return prompts, rng.integers(0, 5, (ROWS, ANSWER))


class Counted(transformers.LogitsProcessor):
    """Presence and frequency penalties, written out."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for row, answer in zip(scores, rows_of_ids()[1].tolist()):
            for token in set(answer):
                row[token] -= self.presence + self.frequency * answer.count(token)
        return scores


@contextmanager
def stable_sort() -> Iterator[None]:
    """torch.sort keeps the order of equal numbers; by default it depends on the processor."""
    with mock.patch.object(torch, "sort", functools.partial(torch.sort, stable=True)):
        yield


@functools.cache
def hf_model() -> Any:
    """A model whose only part in this is that transformers asks it for the list of processors."""
    sizes = {"vocab_size": V, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)
    )


def theirs(logits: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """What transformers makes of the logits, with the processors it chooses and orders itself."""
    prompts, answers = rows_of_ids()
    # An id outside the vocabulary is padding that no processor can mistake for a token.
    padded = np.full((ROWS, PROMPT), V)
    for row, prompt in zip(padded, prompts):
        row[PROMPT - len(prompt) :] = prompt
    names = {"no_repeat_ngram": "no_repeat_ngram_size"}
    own = {
        names.get(k, k): v for k, v in settings.items() if k not in ("presence_penalty", "frequency_penalty")
    }
    config = transformers.GenerationConfig(**({"do_sample": True, "top_k": 0} | own))
    counted = Counted(settings.get("presence_penalty", 0.0), settings.get("frequency_penalty", 0.0))
    mask = torch.from_numpy(padded != V)
    processors = hf_model()._get_logits_processor(
        config, PROMPT, logits_processor=[counted], device="cpu", model_kwargs={"attention_mask": mask}
    )
    ids = torch.from_numpy(np.concatenate([padded, answers], axis=1))
    return processors(ids, torch.from_numpy(logits)).numpy()


def ours(logits: np.ndarray, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same of both frameworks, histories carried forward token by token."""
    sampling = Sampling(**settings)
    prompts, answers = rows_of_ids()
    rules = sampling.top_k, sampling.no_repeat_ngram
    histories = {}
    for module, array in ((jaxlm.logits, jnp.asarray), (torchref.logits, torch.from_numpy)):
        history = module.init_history(sampling, prompts, PROMPT + ANSWER + 3, V)
        for column in answers.T:
            history = module.extend(history, array(np.ascontiguousarray(column)))
        histories[module] = history
    in_jax = compiled()(jnp.asarray(logits), sampling.numbers, *rules, histories[jaxlm.logits])
    in_torch = torchref.logits.process(
        torch.from_numpy(logits), sampling.numbers, *rules, histories[torchref.logits]
    )
    return {"jaxlm": np.asarray(in_jax), "torchref": in_torch.numpy()}


@functools.cache
def compiled() -> Any:
    """The processors as one program; continuous settings are arguments of it."""
    return quick_jit(jaxlm.logits.process, static_argnums=(2, 3))


@functools.cache
def jax_gumbel() -> Any:
    """The noise as one program."""
    return quick_jit(jaxlm.logits.gumbel, static_argnums=(3, 4))


def borderline(logits: np.ndarray, settings: dict[str, Any], found: np.ndarray) -> np.ndarray:
    """Rows in which a probability lies so near a border that rounding decides."""
    near = np.zeros(ROWS, bool)
    for factor in (1 - 1e-6, 1 + 1e-6):
        moved = dict(settings)
        for name in moved.keys() & {"top_p", "min_p"}:
            moved[name] = min(moved[name] * factor, 1.0) if name == "top_p" else moved[name] * factor
        if moved.get("min_p", 0.0) <= 1:
            near |= (np.isneginf(theirs(logits, moved)) != np.isneginf(found)).any(axis=1)
    return near


def assert_same(a: np.ndarray, b: np.ndarray, dtype: str, name: str, settings: dict[str, Any]) -> None:
    """Equal but for rounding before the division by the temperature; infinities and NaN exactly."""
    assert a.dtype == b.dtype == np.dtype(dtype)
    limit = tolerance("f64_logits" if dtype == "float64" else "f32_logits")
    atol = limit / settings.get("temperature", 1.0)
    np.testing.assert_allclose(a, b, rtol=limit, atol=atol, err_msg=f"{name}: {settings}")


def subsets() -> list[dict[str, Any]]:
    """Each setting alone with every value, all together, and random subsets."""
    alone = [{name: value} for name, values in CHOICES.items() for value in values]
    drawn = random.Random(0)
    every = [{name: drawn.choice(values) for name, values in CHOICES.items()} for _ in range(3)]
    every += [{"top_k": 6, "top_p": 0.8731, "min_p": 0.02, "temperature": t} for t in TEMPERATURES]
    some = [
        {name: drawn.choice(CHOICES[name]) for name in drawn.sample(list(CHOICES), drawn.randint(2, 6))}
        for _ in range(6)
    ]
    return alone + every + some


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_processor_is_transformers(dtype: str) -> None:
    """Alone, together and in random subsets, on 1,000 rows of every kind."""
    logits = logits_of(dtype)
    with float64() if dtype == "float64" else nullcontext(), stable_sort(), np.errstate(all="ignore"):
        for settings in subsets():
            expected = theirs(logits, settings)
            rows = np.ones(ROWS, bool)
            if dtype == "float32" and settings.keys() & {"top_p", "min_p"}:
                rows = ~borderline(logits, settings, expected)
                assert rows.mean() > 0.95, settings
            for name, got in ours(logits, settings).items():
                assert_same(got[rows], expected[rows], dtype, name, settings)


def test_top_p_keeps_what_transformers_keeps_however_it_sorts() -> None:
    """With torch's own order of equal logits, which differs between processors, the kept logits are the same."""
    with float64():
        logits = logits_of("float64")
        for top_p in (0.8731, 0.31, 1e-9):
            expected = np.sort(theirs(logits, {"top_p": top_p}), axis=1)
            for name, got in ours(logits, {"top_p": top_p}).items():
                np.testing.assert_array_equal(np.sort(got, axis=1), expected, err_msg=name)


def test_top_p_of_ties_on_the_border_drops_the_lower_ids() -> None:
    """Of eight equal tokens and a tail of 3/8, three go: what sums to the tail exactly is dropped."""
    logits = np.zeros((1, 8), np.float32)
    with stable_sort():
        expected = transformers.TopPLogitsWarper(5 / 8)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(expected, [[-np.inf] * 3 + [0] * 5])
    np.testing.assert_array_equal(jaxlm.logits.keep_top_p(jnp.asarray(logits), 3 / 8), expected)
    np.testing.assert_array_equal(torchref.logits.keep_top_p(torch.from_numpy(logits), 3 / 8), expected)


def test_half_precision_is_processed_in_float32() -> None:
    """Logits of bfloat16 come out as float32, of the same values."""
    logits = np.arange(-4, 4, dtype=np.float32)[None]
    numbers = Sampling(temperature=0.7).numbers
    in_jax = jaxlm.logits.process(jnp.asarray(logits, jnp.bfloat16), numbers, 0, 0)
    in_torch = torchref.logits.process(torch.from_numpy(logits).bfloat16(), numbers, 0, 0)
    assert in_jax.dtype == jnp.float32 and in_torch.dtype == torch.float32
    np.testing.assert_array_equal(in_jax, in_torch.numpy())
    np.testing.assert_array_equal(in_torch.numpy(), logits / np.float32(0.7))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_both_frameworks_choose_the_same_with_shared_noise(dtype: str) -> None:
    """The largest of logits plus noise; without noise the largest logit; on ties the lowest id."""
    logits = logits_of(dtype)
    noise = torchref.logits.gumbel(5, 3, range(ROWS), V, getattr(torch, dtype))
    with float64() if dtype == "float64" else nullcontext():
        for draw in (noise, None):
            in_torch = torchref.logits.choose(torch.from_numpy(logits), draw)
            in_jax = jaxlm.logits.choose(jnp.asarray(logits), None if draw is None else jnp.asarray(draw))
            np.testing.assert_array_equal(in_jax, in_torch.numpy())
    ties = logits_of(dtype)[1::10]
    np.testing.assert_array_equal(torchref.logits.choose(torch.from_numpy(ties)), ties.argmax(1))


@pytest.mark.parametrize("framework", ["jaxlm", "torchref"])
def test_tokens_come_as_often_as_the_processed_softmax_says(framework: str) -> None:
    """Chi-square of 20,000 draws at one step; what was filtered never comes."""
    draws, settings = 20_000, {"temperature": 0.8, "top_k": 9, "top_p": 0.93, "min_p": 0.02}
    logits = np.random.default_rng(4).normal(size=14).astype(np.float32) * 1.5
    logits = np.repeat(logits[None], draws, axis=0)
    sampling = Sampling(**settings)
    processed = torchref.logits.process(torch.from_numpy(logits), sampling.numbers, sampling.top_k, 0)
    probs = processed.double().softmax(-1)[0].numpy()
    if framework == "jaxlm":
        own = jaxlm.logits.process(jnp.asarray(logits), sampling.numbers, sampling.top_k, 0)
        ids = jaxlm.logits.choose(own, jax_gumbel()(11, 2, jnp.arange(draws), 14, jnp.float32))
    else:
        noise = torchref.logits.gumbel(11, 2, range(draws), 14, torch.float32)
        ids = torchref.logits.choose(processed, noise)
    counts = np.bincount(np.asarray(ids), minlength=14)
    assert 3 < (probs > 0).sum() < 9 and not counts[probs == 0].any()
    assert stats.chisquare(counts[probs > 0], draws * probs[probs > 0]).pvalue > tolerance("p_value")


def test_noise_depends_on_seed_step_and_row_alone() -> None:
    """The same in any batch; another for another seed, step or row."""
    for gumbel, array, dtype in (
        (jax_gumbel(), jnp.asarray, jnp.float32),
        (torchref.logits.gumbel, list, torch.float32),
    ):
        whole = np.asarray(gumbel(1, 2, array([0, 1, 2, 3]), V, dtype))
        some = np.asarray(gumbel(1, 2, array([3, 1]), V, dtype))
        np.testing.assert_array_equal(some, whole[[3, 1]])
        others = [gumbel(2, 2, array([0]), V, dtype), gumbel(1, 3, array([0]), V, dtype)]
        every = np.concatenate([whole, *map(np.asarray, others)])
        assert len(np.unique(every)) > 0.99 * every.size


def test_a_history_carried_forward_is_one_built_at_once() -> None:
    """Of both frameworks: ids, ids seen and counts, token by token, and rows picked from it."""
    prompts, answers = rows_of_ids()
    settings = Sampling(repetition_penalty=1.3, frequency_penalty=0.5, no_repeat_ngram=2)
    slots = PROMPT + ANSWER
    whole = [prompt + answer for prompt, answer in zip(prompts, answers.tolist())]
    counts = np.stack([np.bincount(answer, minlength=V) for answer in answers])
    rows = np.asarray([5, 5, 0])
    for module, array in ((jaxlm.logits, jnp.asarray), (torchref.logits, torch.from_numpy)):
        history = module.init_history(settings, prompts, slots, V)
        for column in answers.T:
            history = module.extend(history, array(np.ascontiguousarray(column)))
        once = module.init_history(settings, whole, slots, V)
        for got, expected in ((history.seen, once.seen), (history.ids, once.ids), (history.counts, counts)):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
        assert int(history.length) == int(once.length) == slots
        picked = module.select_history(history, array(rows))
        np.testing.assert_array_equal(np.asarray(picked.counts), counts[rows])
        assert module.init_history(Sampling(), prompts, slots, V) == (None,) * 4
