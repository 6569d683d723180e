"""Scoring in both frameworks against a plain float64 computation: one forward per token, written out."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import QUICK, V, random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.evaluate  # noqa: E402
import torchref.evaluate  # noqa: E402
from convert.native import build_torch  # noqa: E402
from jaxlm.config import ConfigError, ModelConfig  # noqa: E402
from jaxlm.model import Split, abstract_model  # noqa: E402
from jaxlm.perplexity import by_position, total, totals  # noqa: E402
from jaxlm.windows import WIDTHS, Scores  # noqa: E402

pytestmark = pytest.mark.torch

CASES: dict[str, ModelConfig] = {
    "dense-tied": tiny(n_layers=1, init="fan_in", tied=True, head_bias=True),
    "moe-windows": tiny({"capacity_factor": 0.5}, n_layers=1, init="fan_in", windows=(5,)),
    "learned-bias-table": tiny(n_layers=1, init="fan_in", position="learned", attn_bias_table=True),
}
LENGTHS = (23, 1, 9, 0, 14)  # windows of 8 and 1, so that few programs are compiled
WINDOW, STRIDE, FRONT = 8, 3, 5
BYTES = np.arange(V, dtype=np.int32) % 4  # bytes that an id stands for


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


@functools.cache
def documents() -> list[np.ndarray]:
    """Ids of unequal documents, the same every time."""
    rng = np.random.default_rng(4)
    return [rng.integers(0, V, n) for n in LENGTHS]


def models(name: str, dtype: str) -> dict[str, tuple[Any, Any]]:
    """The case's model in both frameworks, each with its `score`."""
    params = random_params(CASES[name], dtype=np.dtype(dtype))
    split = Split(abstract_model(CASES[name]).graphdef, {k: jnp.asarray(v) for k, v in params.items()})
    return {
        "jax": (split, jaxlm.evaluate.score),
        "torch": (build_torch(CASES[name], params), torchref.evaluate.score),
    }


@functools.cache
def plain(name: str, front: int | None) -> tuple[list[list[float]], list[list[bool]], list[list[int]]]:
    """Log-probabilities, greedy hits and lengths of context of every token that has one, token by token: one row,
    no padding, all logits, float64.
    """
    decoder = build_torch(CASES[name], random_params(CASES[name], dtype=np.float64))
    logprobs, greedy, seen = [], [], []
    for document in documents():
        ids = document.tolist() if front is None else [front, *document.tolist()]
        values, hits, lengths = [], [], []
        for t in range(1, len(ids)):
            reach = WINDOW + STRIDE * math.ceil(max(t - WINDOW, 0) / STRIDE)  # of the first window that has t
            begin = max(min(reach, len(ids) - 1) - WINDOW, 0)
            with torch.no_grad():
                logits = decoder(torch.tensor([ids[begin:t]]))[0][0, -1]
            assert logits.dtype == torch.float64
            values.append(float(logits[ids[t]] - torch.log(torch.exp(logits).sum())))
            hits.append(int(logits.argmax()) == ids[t])
            lengths.append(t - begin)
        logprobs.append(values)
        greedy.append(hits)
        seen.append(lengths)
    return logprobs, greedy, seen


def scored(scores: Scores) -> list[list[list[float]]]:
    """What was scored, as lists: log-probabilities, hits and contexts by document."""
    masks = [context > 0 for context in scores.context]
    return [[values[mask].tolist() for values, mask in zip(part, masks)] for part in scores]


@pytest.mark.parametrize("front", [None, FRONT], ids=["bare", "front"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_plain_computation_in_float64(name: str, front: int | None, x64: None) -> None:
    """Every token's log-probability, hit and context in both frameworks, and the perplexity they come to."""
    logprobs, greedy, seen = plain(name, front)
    flat = [x for values in logprobs for x in values]
    for model, score in models(name, "float64").values():
        scores = score(model, documents(), WINDOW, STRIDE, 4, front)
        assert [len(values) for values in scores.logprobs] == list(LENGTHS)
        assert all(values.dtype == np.float64 for values in scores.logprobs)
        found = scored(scores)
        assert found[1] == greedy and found[2] == seen
        assert relative_error([x for values in found[0] for x in values], flat) <= tolerance("f64_score")
        result = total(scores, documents(), BYTES)
        expected = math.exp(-sum(flat) / len(flat))
        assert result.tokens == len(flat)
        assert result.unscored == (0 if front is not None else sum(n > 0 for n in LENGTHS))
        assert abs(result.perplexity / expected - 1) <= tolerance("f64_score")


@pytest.mark.parametrize("name", ["dense-tied", "moe-windows"])
def test_perplexity_in_float32(name: str) -> None:
    """Of both frameworks, against the plain float64 computation on the weights before they were rounded."""
    logprobs, _, _ = plain(name, FRONT)
    flat = [x for values in logprobs for x in values]
    expected = math.exp(-sum(flat) / len(flat))
    for model, score in models(name, "float32").values():
        result = total(score(model, documents(), WINDOW, STRIDE, 4, FRONT), documents(), BYTES)
        assert abs(result.perplexity / expected - 1) <= tolerance("f32_perplexity")


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_results_do_not_depend_on_the_batch(framework: str, x64: None) -> None:
    """Rows beside a window, and how many of them are padding, change nothing."""
    model, score = models("moe-windows", "float64")[framework]
    found = []
    for batch in (1, 50):
        told: list[int] = []
        scores = score(model, documents(), WINDOW, STRIDE, batch, FRONT, told.append)
        found.append(total(scores, documents(), BYTES))
        assert sum(told) == found[-1].tokens, "progress is told of every token"
    for result in found[1:]:
        assert result[:3] == found[0][:3]
        assert relative_error(result[3:], found[0][3:]) <= tolerance("f64_score")


@pytest.mark.parametrize("chunk", [1, 2 * V, 5 * V, 1 << 20])
def test_chunks_of_the_head_change_nothing(chunk: int, x64: None) -> None:
    """Against a log-softmax over all logits: chunks that divide the tokens and chunks that do not."""
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(3, 5, 8)), rng.normal(size=(8, V)), rng.normal(size=V)
    targets = rng.integers(0, V, (3, 5))
    targets[0] = (x[0] @ weight + bias).argmax(-1)
    logits = torch.tensor(x @ weight + bias)
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(targets)[..., None])[..., 0]
    ours = jaxlm.evaluate.token_scores(*map(jnp.asarray, (x, weight, bias, targets)), chunk)
    theirs = torchref.evaluate.token_scores(*map(torch.tensor, (x, weight, bias, targets)), chunk)
    for logprobs, greedy in (ours, theirs):
        assert relative_error(logprobs, expected) <= tolerance("f64_score")
        np.testing.assert_array_equal(greedy, logits.argmax(-1).numpy() == targets)
        assert np.asarray(greedy)[0].all()


def test_half_precision_logits_are_upcast() -> None:
    """bfloat16 hidden states give float32 log-probabilities, of rounded logits unless XLA spares the rounding."""
    rng = np.random.default_rng(0)
    x, weight, targets = rng.normal(size=(2, 3, 8)), rng.normal(size=(8, V)), rng.integers(0, V, (2, 3))
    half = torch.tensor(x).bfloat16(), torch.tensor(weight).bfloat16()
    expected = (
        (half[0] @ half[1]).float().log_softmax(-1).gather(-1, torch.tensor(targets)[..., None])[..., 0]
    )
    ours, _ = jaxlm.evaluate.token_scores(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), None, jnp.asarray(targets)
    )
    theirs, _ = torchref.evaluate.token_scores(*half, None, torch.tensor(targets))
    assert ours.dtype == jnp.float32 and theirs.dtype == torch.float32
    assert relative_error(theirs, expected) <= tolerance("f32_loss")
    assert relative_error(ours, expected) <= tolerance("bf16_head")


def test_one_compilation_per_shape() -> None:
    """However many documents, batches and calls there are, WIDTHS programs serve."""
    model, score = models("dense-tied", "float32")["jax"]
    run = jaxlm.evaluate._compiled(model.graphdef)
    before = run._cache_size()
    for _ in range(2):
        score(model, [*documents(), *documents()], 16, 5, 3)
    assert 0 < run._cache_size() - before <= WIDTHS


def test_totals_are_means_over_tokens(x64: None) -> None:
    """Loss, bytes and bits of all and of each document, and the loss by position, from the plain values."""
    logprobs, greedy, seen = plain("dense-tied", None)
    model, score = models("dense-tied", "float64")["torch"]
    scores = score(model, documents(), WINDOW, STRIDE, 4)
    flat = [x for values in logprobs for x in values]
    result, each = total(scores, documents(), BYTES), totals(scores, documents(), BYTES)
    size = sum(int(BYTES[ids[1:]].sum()) for ids in documents())
    expected = (-sum(flat) / len(flat), -sum(flat) / math.log(2) / size, sum(map(sum, greedy)) / len(flat))
    assert result.bytes == size
    found = (result.loss, result.bits_per_byte, result.accuracy)
    assert relative_error(found, expected) <= tolerance("f64_score")
    for one, values, n in zip(each, logprobs, LENGTHS):
        assert (one.tokens, one.unscored) == (max(n - 1, 0), min(n, 1))
        assert math.isnan(one.loss) if n < 2 else abs(one.loss * len(values) + sum(values)) < 1e-12
    pairs = [(p, -x) for lengths, values in zip(seen, logprobs) for p, x in zip(lengths, values)]
    for position in by_position(scores):
        values = [x for p, x in pairs if p == position.first]
        assert position.tokens == len(values)
        assert abs(position.loss - sum(values) / len(values)) < 1e-12
    assert sum(p.tokens for p in by_position(scores)) == len(flat)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_refuses_what_the_model_cannot_read(framework: str) -> None:
    """A window over the context, and an id beyond the vocabulary, each with its value."""
    model, score = models("dense-tied", "float32")[framework]
    with pytest.raises(ConfigError, match="window of 40 tokens exceeds the model's context of 32"):
        score(model, [np.arange(41)], 40, 20, 2)
    with pytest.raises(ConfigError, match=f"document 1 holds id {V}, outside the model's vocabulary of {V}"):
        score(model, [[1, 2], [1, V]], 8, 4, 2)
    with pytest.raises(ConfigError, match="document 0 holds id -1"):
        score(model, [[1, -1]], 8, 4, 2)
