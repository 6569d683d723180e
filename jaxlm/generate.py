"""Decoding: prompts in, tokens out, one at a time through the cache. Twin: torchref/generate.py.

    logits = f(prompt);   token = choose(process(logits) + noise);   logits = f(token | cache);   ...

The noise of a token is a pure function of (seed, its place in the answer, the answer's number), so an answer depends
neither on how many tokens one dispatch makes nor on the prompts beside it.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.attention import KVCache
from jaxlm.beam import beam_search
from jaxlm.cached import prefill, select_rows, step
from jaxlm.logits import History, choose, extend, gumbel, init_history, process
from jaxlm.model import Params, Split, merge_model
from jaxlm.sampling import Answer, Numbers, Sampling, check_prompts, cut, groups, sampling
from jaxlm.shapes import Float
from jaxlm.text import Completion, Ended, complete
from jaxlm.tokenizer import Tokenizer

BURST = 32  # tokens of one dispatch at most, a multiple of STRIDE; whatever is asked for, compiled once
STRIDE = 8  # tokens between two looks at whether all answers have ended, where a look makes the device wait
PATIENCE = 0.05  # seconds that a stream may keep back tokens for the sake of fewer dispatches


def decode(
    model: Split,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    noise: Float[Array, "M R V"] | None = None,
    ended: Ended | None = None,
) -> list[list[Answer]]:
    """The answers to each prompt, `settings.samples` of them, best first where they are beams'.

    noise: Gumbel noise for each token of each answer (R = prompts times samples), instead of the seed's. ended: asked
    now and then with an answer's number and its ids so far, whether it may end there. Raises ConfigError when a prompt
    and the longest answer do not fit the model's context.
    """
    config = merge_model(*model).config
    check_prompts(config, prompts, settings.max_new_tokens + max(map(len, prompts), default=0))
    answers: list[list[Answer]] = [[] for _ in prompts]
    for chosen in groups(config, prompts):
        if settings.num_beams > 1:
            for row, best in zip(chosen, beam_search(model, [prompts[row] for row in chosen], settings)):
                answers[row] = best
            continue
        ids: list[list[int]] = [[] for _ in range(len(chosen) * settings.samples)]
        logprobs: list[list[float]] = [[] for _ in ids]
        numbers = [row * settings.samples + sample for row in chosen for sample in range(settings.samples)]
        over, first = np.zeros(len(ids), bool), BURST if ended is None else 1
        for block in _blocks(model, [prompts[row] for row in chosen], numbers, settings, noise, over, first):
            for row in np.flatnonzero(~over):
                new, last = cut(block.ids[row].tolist(), settings.stop)
                ids[row] += new
                logprobs[row] += block.logprobs[row, : len(new)].tolist() if settings.logprobs else []
                over[row] = last or (ended is not None and ended(numbers[row], ids[row]))
        for row, number in enumerate(numbers):
            finish = "stop" if over[row] else "length"
            answers[number // settings.samples].append(Answer(ids[row], logprobs[row], finish, 0.0))
    return answers


def stream(
    model: Split, prompt: Sequence[int], settings: Sampling, noise: Float[Array, "M 1 V"] | None = None
) -> Iterator[int]:
    """The same ids as `decode` for one prompt and sample, as they come; a beam's only when it is found.

    Raises as `decode`, at once.
    """
    check_prompts(merge_model(*model).config, [prompt], len(prompt) + settings.max_new_tokens)
    if settings.num_beams > 1 or settings.samples > 1:
        return iter(decode(model, [prompt], settings, noise)[0][0].ids)
    return _stream(model, prompt, settings, noise)


def _stream(model: Split, prompt: Sequence[int], settings: Sampling, noise: Any) -> Iterator[int]:
    for block in _blocks(model, [prompt], [0], settings, noise, np.zeros(1, bool), first=1):
        new, last = cut(block.ids[0].tolist(), settings.stop)
        yield from new
        if last:
            return


def generate(
    model: Split,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    front: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[str] = (),
    **settings: Any,
) -> list[list[Completion]]:
    """Continuations of texts, [prompt][sample]: `generate(model, tokenizer, "Once", temperature=0.7, top_k=40)`.

    settings: the fields of `Sampling`. front: ids before each text, such as bos. An answer ends at a stop string, at
    one of the tokens `stop_tokens` (as text) or `stop` (as ids), by default the one that separates the tokenizer's
    documents. Raises ConfigError on settings that cannot work and on prompts that do not fit.
    """
    if "stop" not in settings and tokenizer.eos_id is not None:
        settings["stop"] = (tokenizer.eos_id,)

    def run(ids: list[list[int]], chosen: Sampling, ended: Ended | None) -> list[list[Answer]]:
        return decode(model, ids, chosen, ended=ended)

    options = {"front": front, "stop_strings": stop_strings, "stop_tokens": stop_tokens}
    return complete(run, tokenizer, prompts, sampling(settings), **options)


class _Block(NamedTuple):
    """New tokens of all rows."""

    ids: np.ndarray  # [B, n]
    logprobs: np.ndarray  # [B, n]; of no meaning unless they were asked for


class _Draws(NamedTuple):
    """What choosing tokens on the device needs; all of it may be traced."""

    numbers: Numbers
    seed: Array
    rows: Array  # [B], numbers of the answers
    noise: Array | None  # [M, B, V]; None = the seed's
    stop: np.ndarray


class _Rules(NamedTuple):
    """What is fixed at trace time of choosing tokens."""

    top_k: int
    ngram: int
    logprobs: bool


class _Loop(NamedTuple):
    """What the loop carries on the device from one token to the next."""

    tokens: Array  # [B], the newest
    done: Array  # [B], a stop id came, or the caller wants no more
    history: History
    cache: KVCache
    positions: Array  # [B]


def _blocks(
    model: Split,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    settings: Sampling,
    noise: Any,
    over: np.ndarray,
    first: int = BURST,
) -> Iterator[_Block]:
    """New tokens of the answers `numbers` to `prompts`, until all of them are over or long enough.

    over: rows that the caller wants no more of; read before each dispatch, which goes on past single ones. The first
    dispatch makes `first` ids (or a stride), the next twice as many while one takes less than PATIENCE.
    """
    longest = max(map(len, prompts))
    logits, state = prefill(model, prompts, longest + settings.max_new_tokens)
    if settings.samples > 1:
        repeated = jnp.repeat(jnp.arange(len(prompts)), settings.samples)
        logits, state = logits[repeated], select_rows(state, repeated)
        prompts = [prompts[row] for row in repeated.tolist()]
    rows, wide = jnp.asarray(numbers, jnp.int32), jnp.promote_types(logits.dtype, jnp.float32)
    noise = None if noise is None else jnp.asarray(noise, wide)[:, rows]
    stop = np.asarray(settings.stop, np.int32)
    draws = _Draws(settings.numbers, jnp.asarray(settings.seed, jnp.uint32), rows, noise, stop)
    rules = _Rules(settings.top_k, settings.no_repeat_ngram, settings.logprobs)
    slots = state.cache.segment.shape[1]
    history = init_history(settings, prompts, slots, logits.shape[1])
    run = _compiled(model.graphdef)  # looked up once: hashing a deep graph takes milliseconds
    stride = _stride()
    tokens, logprobs, history = run.pick(logits, history, draws, 0, rules)
    yield _Block(np.asarray(tokens)[:, None], np.asarray(logprobs)[:, None])
    loop = _Loop(tokens, jnp.asarray(over), history, state.cache, state.positions)
    written, count = 1, first
    while written < settings.max_new_tokens and not over.all():
        started = time.perf_counter()
        asked = min(count, settings.max_new_tokens - written)
        made, ids, logprobs, loop = run.burst(
            model.params, loop._replace(done=jnp.asarray(over)), draws, written, asked, rules, stride
        )
        n = min(int(made), settings.max_new_tokens - written)
        yield _Block(np.asarray(ids)[:, :n], np.asarray(logprobs)[:, :n])
        written += n
        if time.perf_counter() - started < PATIENCE:
            count = min(2 * count, BURST)


def lower_greedy(graphdef: Any, shapes: dict[str, Any], cache: Any, place: Any) -> jax.stages.Lowered:
    """The program that `decode` dispatches on a GPU without sampling, lowered for shapes.

    shapes: of the parameters, by path; cache: of a KVCache, its arrays to be given up. place: a sharding of all.
    """
    batch = cache.segment.shape[0]
    row: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    flag: Any = jax.ShapeDtypeStruct((batch,), bool)
    one: Any = jax.ShapeDtypeStruct((), jnp.int32)
    stop: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    loop = _Loop(row, flag, History(None, None, None, None), cache, row)
    draws = _Draws(Sampling(greedy=True).numbers, one, row, None, stop)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (shapes, loop, draws, one, one)
    )
    return _compiled(graphdef).burst.lower(*placed, _Rules(0, 0, False), STRIDE)


class _Compiled(NamedTuple):
    """The jitted functions of one model."""

    pick: Callable[..., Any]
    burst: Callable[..., Any]


@functools.lru_cache(maxsize=16)
def _compiled(graphdef: Any) -> _Compiled:
    def burst(
        params: Params, loop: _Loop, draws: _Draws, first: Array, count: Array, rules: _Rules, stride: int
    ) -> Any:
        """At least `count` tokens unless all answers end before, up to `stride` - 1 more than either needs."""

        def more(carry: Any) -> Array:
            made, _, _, loop = carry
            return (made < count) & ~jnp.all(loop.done)

        def one(carry: Any) -> Any:
            made, ids, logprobs, loop = carry
            logits, cache, positions = step(graphdef, params, loop.cache, loop.tokens, loop.positions)
            tokens, logprob, history = _pick(logits, loop.history, draws, first + made, rules)
            ids = jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, None], made, axis=1)
            logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, logprob[:, None], made, axis=1)
            done = loop.done | jnp.isin(tokens, draws.stop)
            return made + 1, ids, logprobs, _Loop(tokens, done, history, cache, positions)

        ids = jnp.zeros((loop.tokens.shape[0], BURST), jnp.int32)
        dtype = jnp.promote_types(loop.cache.layers[0].k.dtype, jnp.float32)
        carry = (jnp.zeros((), jnp.int32), ids, ids.astype(dtype), loop)
        if stride == 1:
            return jax.lax.while_loop(more, one, carry)
        # A loop of known length is run without asking: `more` is read back by the host before each round.
        return jax.lax.while_loop(
            more, lambda carry: jax.lax.fori_loop(0, stride, lambda _, c: one(c), carry), carry
        )

    return _Compiled(
        jax.jit(_pick, static_argnums=4),
        jax.jit(burst, donate_argnums=1, static_argnums=(5, 6)),
    )


def _stride() -> int:
    """On CPU a loop's condition costs nothing, and a token that nobody needs does."""
    return 1 if jax.default_backend() == "cpu" else STRIDE


def _pick(
    logits: Array, history: History, draws: _Draws, step: int | Array, rules: _Rules
) -> tuple[Array, Array, History]:
    """Token number `step` of each answer, its log-probability (0 if not asked), and the history with it."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    processed = process(logits, draws.numbers, rules.top_k, rules.ngram, history)
    noise = None
    if draws.numbers.temperature is not None:
        if draws.noise is None:
            noise = gumbel(draws.seed, step, draws.rows, logits.shape[1], wide)
        else:
            noise = draws.noise[step]
    tokens = choose(processed, noise)
    logprobs = jnp.zeros(tokens.shape, wide)
    if rules.logprobs:
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
        logprobs = chosen.astype(wide) - jax.nn.logsumexp(logits.astype(wide), axis=-1)
    return tokens, logprobs, extend(history, tokens)
