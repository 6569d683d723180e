"""How likely a model finds given tokens: log-probabilities, each token once. Twin: torchref/evaluate.py.

    log p(t_i | t_<i) = logits[t_i] - logsumexp(logits)

The head is applied in chunks of tokens, so that logits of a whole batch never exist; softmax upcast. Which tokens are
scored with which context: jaxlm/windows.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.layers import add_bias, upcast
from jaxlm.model import Params, Split, merge_model
from jaxlm.shapes import Bool, Float, Int
from jaxlm.windows import Scores, Window, as_documents, batches, check_window, plan

CHUNK_LOGITS = 2**26  # logits of one chunk: 256 MB in float32


def token_scores(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, "B T"],
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Natural log-probability of each target, and whether it has the largest logit (the lowest id on ties)."""
    B, T, D = hidden.shape
    length = max(1, min(B * T, chunk_logits // weight.shape[1]))
    chunks = -(-B * T // length)

    def split(x: Array) -> Array:
        """[P, ...] -> [chunks, length, ...], the tail filled with zeros."""
        x = jnp.pad(x, ((0, chunks * length - B * T), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, length, *x.shape[1:])

    def one(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        x, target = chunk
        logits = x @ weight.astype(x.dtype)
        wide = upcast(logits if bias is None else add_bias(logits, bias))
        chosen = jnp.take_along_axis(wide, target[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(wide, axis=-1), jnp.argmax(wide, axis=-1) == target

    logprobs, greedy = jax.lax.map(one, (split(hidden.reshape(B * T, D)), split(targets.reshape(-1))))
    return logprobs.reshape(-1)[: B * T].reshape(B, T), greedy.reshape(-1)[: B * T].reshape(B, T)


def score_windows(
    model: Split,
    documents: Sequence[np.ndarray],
    windows: Sequence[Window],
    batch: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """The tokens that windows score. `batch`: rows computed together; `progress`: told how many tokens were done.

    Raises ConfigError where a window exceeds the model's context or batch < 1.
    """
    check_window(windows, merge_model(*model).config.context)
    scores, run, waiting = Scores.empty(documents), _compiled(model.graphdef), None
    for rows in batches(documents, windows, batch):
        made = run(model.params, rows.inputs, rows.targets, rows.segments)
        # The batch before is fetched while the device computes this one.
        if waiting is not None:
            progress(scores.put(waiting[0], *map(np.asarray, waiting[1])))
        waiting = (rows, made)
    if waiting is not None:
        progress(scores.put(waiting[0], *map(np.asarray, waiting[1])))
    return scores


def score(
    model: Split,
    documents: Sequence[Sequence[int] | np.ndarray],
    window: int,
    stride: int,
    batch: int,
    front: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Every token of every document, scored once by strided windows.

    Args:
        model: graph and parameters, in the dtype to compute in.
        documents: ids.
        window: tokens read at once, at most the model's context.
        stride: tokens that each window but the first scores: a token has at least window - stride of context.
        batch: windows computed together.
        front: id that stands before each document, so that its first token has a context; None = it is not scored.
        progress: told how many tokens were done.

    Raises:
        ConfigError: a window, stride or batch that cannot be, or an id outside the vocabulary.
    """
    arrays = as_documents(documents, front, merge_model(*model).config.vocab_size)
    windows = plan([len(ids) for ids in arrays], window, stride)
    scores = score_windows(model, arrays, windows, batch, progress)
    return scores if front is None else scores.without_front()


@functools.lru_cache(maxsize=16)
def _compiled(graphdef: Any) -> Callable[..., tuple[Array, Array]]:
    def run(params: Params, inputs: Array, targets: Array, segments: Array) -> tuple[Array, Array]:
        decoder = merge_model(graphdef, params)
        hidden, _, _ = decoder.hidden(inputs, segments=segments)
        weight, bias = decoder.head()
        return token_scores(hidden, weight, bias, targets)

    return jax.jit(run)
