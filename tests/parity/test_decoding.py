"""Decoding in both frameworks: the same cache, the same choices, the same refusals."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from helpers import QUICK, V, random_params, relative_error, tiny  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.cached  # noqa: E402
import jaxlm.generate  # noqa: E402
import torchref.attention  # noqa: E402
import torchref.cached  # noqa: E402
import torchref.generate  # noqa: E402
import torchref.logits  # noqa: E402
from convert.native import build_torch  # noqa: E402
from jaxlm.config import ConfigError, ModelConfig, RopeScaling  # noqa: E402
from jaxlm.model import Split, abstract_model  # noqa: E402
from jaxlm.sampling import Sampling  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 5
LINEAR = RopeScaling("linear", factor=3.0)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=16, low_freq_factor=1.5, high_freq_factor=5.0)
YARN = RopeScaling("yarn", factor=4.0, original_context=8)
CASES: dict[str, ModelConfig] = {
    "dense-linear": tiny(init="fan_in", rope_scaling=LINEAR),
    "tied-llama3": tiny(init="fan_in", tied=True, head_bias=True, qk_norm=True, rope_scaling=LLAMA3),
    "moe-windows-yarn": tiny({"capacity_factor": 0.5}, init="fan_in", windows=(4, 0), rope_scaling=YARN),
    "learned-bias-table": tiny(init="fan_in", position="learned", attn_bias_table=True, mlp="gelu_erf"),
}
TWINS = tiny({"pattern": (True, False)}, init="fan_in", windows=(0, 5))
PROMPTS = [[7, 3, 60, 22, 5, 11, 40, 2, 9], [1], [30, 31, 32, 33], [8, 8, 8, 8]]  # three lengths, four rows


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


@pytest.fixture(scope="module")
def twins() -> tuple[Split, Any]:
    """One float32 model in both frameworks."""
    params = random_params(TWINS, dtype=np.float32)
    model = Split(
        abstract_model(TWINS).graphdef, {path: jnp.asarray(value) for path, value in params.items()}
    )
    return model, build_torch(TWINS, params)


def answers(module: Any, model: Any, *arguments: Any) -> list[list[int]]:
    """The ids of the one answer to each prompt."""
    return [best.ids for (best,) in module.generate.decode(model, *arguments)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_torch_cached_decoding_is_the_full_forward(name: str, dtype: str) -> None:
    """Prefill and steps with a cache against one forward without, at every new position of unequal rows."""
    config = CASES[name]
    model = build_torch(config, random_params(config, dtype=np.dtype(dtype)))
    rng = np.random.default_rng(1)
    lengths = (7, 7, 7) if config.attn_bias_table else (11, 3, 7)
    prompts = [rng.integers(0, V, n).tolist() for n in lengths]
    rest = torch.from_numpy(rng.integers(0, V, (STEPS, len(prompts))))
    logits, state = torchref.cached.prefill(model, prompts, max(lengths) + STEPS)
    made = [logits]
    for tokens in rest:
        logits, state = torchref.cached.decode_step(model, tokens, state)
        made.append(logits)
    limit = tolerance("f64_decode" if dtype == "float64" else "f32_decode")
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + rest[:, row].tolist()])
        full = model(ids)[0][0, len(prompt) - 1 :].detach()
        assert relative_error(torch.stack([x[row] for x in made]), full) < limit


def test_greedy_answers_are_equal(twins: tuple[Split, Any]) -> None:
    """Token for token, and greedy in torch is the argmax of the full forward."""
    model, decoder = twins
    ours = answers(jaxlm, model, PROMPTS, Sampling(16, greedy=True))
    theirs = answers(torchref, decoder, PROMPTS, Sampling(16, greedy=True))
    assert ours == theirs
    assert len({token for row in ours for token in row}) > 10, "an answer that repeats itself proves little"
    for prompt, answer in zip(PROMPTS, theirs):
        best = decoder(torch.tensor([prompt + answer]))[0][0].argmax(-1)
        assert answer == best[len(prompt) - 1 : -1].tolist()


def test_answers_under_shared_noise_are_equal(twins: tuple[Split, Any]) -> None:
    """With one source of Gumbel noise, sampling is a function of the logits: token for token, whatever the settings."""
    model, decoder = twins
    noise = np.random.default_rng(5).gumbel(size=(16, 2 * len(PROMPTS), V)).astype(np.float32)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.3}
    every = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "no_repeat_ngram": 2} | penalties
    for facts in ({"temperature": 0.9, "top_k": 12, "stop": (17, 4)}, every | {"logprobs": True}):
        settings = Sampling(16, samples=2, **facts)
        ours = jaxlm.generate.decode(model, PROMPTS, settings, jnp.asarray(noise))
        theirs = torchref.generate.decode(decoder, PROMPTS, settings, torch.from_numpy(noise))
        for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            assert a[:1] + a[2:] == b[:1] + b[2:]
            assert len(a.logprobs) == len(b.logprobs) == (len(a.ids) if settings.logprobs else 0)
            assert not a.logprobs or relative_error(a.logprobs, b.logprobs) < tolerance("f32_decode")
        single = Sampling(16, **facts)
        (first,) = torchref.generate.decode(decoder, PROMPTS[:1], single, torch.from_numpy(noise[:, :1]))[0]
        assert first.ids == ours[0][0].ids
        streamed = torchref.generate.stream(decoder, PROMPTS[0], single, torch.from_numpy(noise[:, :1]))
        assert list(streamed) == first.ids


def test_a_torch_seed_reproduces_and_rows_do_not_mix(twins: tuple[Split, Any]) -> None:
    """An answer depends on prompt, seed and row only; `stream` gives the same ids."""
    decoder = twins[1]
    settings = Sampling(16, seed=3)
    first = answers(torchref, decoder, PROMPTS, settings)
    assert answers(torchref, decoder, PROMPTS, settings) == first
    assert answers(torchref, decoder, [PROMPTS[0], [5]], settings)[0] == first[0]
    assert list(torchref.generate.stream(decoder, PROMPTS[0], settings)) == first[0]
    assert answers(torchref, decoder, PROMPTS, Sampling(16, seed=4)) != first


def test_torch_half_precision_takes_float32_noise_of_each_answer() -> None:
    """A bfloat16 model: the seed's noise is float32 `gumbel` of the answer's number, whatever group it is made in."""
    config = CASES["learned-bias-table"]
    decoder = build_torch(config, random_params(config, dtype=np.float32)).bfloat16()
    prompts, settings = [[5, 6, 7], [8, 9]], Sampling(16, temperature=4.0, samples=20, seed=3, logprobs=True)
    found = torchref.generate.decode(decoder, prompts, settings)
    noise = torch.stack([torchref.logits.gumbel(3, step, range(40), V, torch.float32) for step in range(16)])
    assert torchref.generate.decode(decoder, prompts, settings, noise) == found
    alone = torchref.generate.decode(decoder, prompts[1:], settings, noise[:, 20:])
    assert alone == found[1:], "numbered across the groups"
    logprobs = torch.tensor([answer.logprobs for of_one in found for answer in of_one])
    assert (logprobs != logprobs.bfloat16().float()).float().mean() > 0.9, "rounded to half precision"
    logits, state = torchref.cached.prefill(decoder, prompts[:1], 8)
    dtypes = {logits.dtype, *(x.dtype for layer in state.cache.layers for x in layer)}
    assert dtypes == {torch.bfloat16} and not logits.requires_grad


def test_torch_reads_a_long_prompt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks shorter than the window, than the padding, and with a rest: the logits of one piece."""
    decoder, found = build_torch(TWINS, random_params(TWINS)), {}
    for chunk in (512, 3, 4):
        monkeypatch.setattr(torchref.cached, "CHUNK", chunk)
        logits, state = torchref.cached.prefill(decoder, PROMPTS, 11)
        found[chunk] = torch.stack(
            [logits, torchref.cached.decode_step(decoder, torch.tensor([1, 2, 3, 4]), state)[0]]
        )
    for chunk in (3, 4):
        assert relative_error(found[chunk], found[512]) < tolerance("f64_decode")


def test_a_torch_cache_forgets_the_padding_on_the_right() -> None:
    """Columns of padding after all rows' tokens, more than the window: the next step is that without them."""
    decoder, ids = build_torch(TWINS, random_params(TWINS)), np.zeros((4, 15), np.int64)
    for row, prompt in zip(ids, PROMPTS):
        row[9 - len(prompt) : 9] = prompt
    segments = np.int64([[9 - len(prompt) <= i < 9 for i in range(15)] for prompt in PROMPTS])
    positions = np.maximum(segments.cumsum(axis=1) - 1, 0)
    _, state = torchref.cached.prefill(decoder, PROMPTS, 16)
    tokens, cache = torch.tensor([1, 2, 3, 4]), torchref.attention.init_cache(TWINS, 4, 16, torch.float64)
    expected = torchref.cached.decode_step(decoder, tokens, state)[0]
    with torch.no_grad():
        cache = decoder(*(torch.from_numpy(a) for a in (ids, positions, segments)), cache)[2]
        assert cache.length == 9
        found = decoder(tokens[:, None], state.positions[:, None], cache=cache)[0][:, 0]
    assert relative_error(found, expected) < tolerance("f64_decode")


@pytest.mark.parametrize("framework", ["jaxlm", "torchref"])
def test_a_caller_ends_an_answer_by_its_number(framework: str) -> None:
    """Asked at the first token already, and by the prompt's place, though prompts of one length are made together."""
    config, prompts, asked = CASES["learned-bias-table"], [[5, 6, 7], [8, 9]], set()
    params = random_params(config, dtype=np.float32)
    model = build_torch(config, params)
    if framework == "jaxlm":
        model = Split(abstract_model(config).graphdef, {path: jnp.asarray(v) for path, v in params.items()})

    def ended(number: int, ids: Any) -> bool:
        asked.add(number)
        return number == 1

    module = {"jaxlm": jaxlm, "torchref": torchref}[framework].generate
    found = [best for (best,) in module.decode(model, prompts, Sampling(STEPS, greedy=True), ended=ended)]
    assert asked == {0, 1}
    assert [(answer.finish, len(answer.ids)) for answer in found] == [("length", STEPS), ("stop", 1)]


def test_torch_noise_is_gumbel() -> None:
    """Mean and variance of standard Gumbel noise: Euler's constant and pi^2/6."""
    noise = torchref.logits.gumbel(0, 1, range(20), 2_000, torch.float64)
    error = noise.var().sqrt() / noise.numel() ** 0.5
    assert abs(noise.mean() - np.euler_gamma) < tolerance("sigmas") * error
    assert (
        abs(noise.var() - np.pi**2 / 6) < tolerance("sigmas") * 4.4**0.5 * noise.var() / noise.numel() ** 0.5
    )
    assert len({tuple(row[:3].tolist()) for row in noise}) == 20


@pytest.mark.parametrize("prompts", [[[1] * 30], [], [[1], []], [[1, V]], [[-1]]])
def test_both_refuse_alike(twins: tuple[Split, Any], prompts: list[list[int]]) -> None:
    """The same one-line message, context overflow among them; in `stream` before the first id is asked for."""
    messages = []
    for module, model in zip((jaxlm.generate, torchref.generate), twins):
        with pytest.raises(ConfigError) as caught:
            module.decode(model, prompts, Sampling(12))
        messages.append(str(caught.value))
        if len(prompts) == 1:
            with pytest.raises(ConfigError):
                module.stream(model, prompts[0], Sampling(12))
    assert messages[0] == messages[1] and "\n" not in messages[0]


def test_cached_logits_are_equal_in_float64(x64: None) -> None:
    """Prefill and one step of the two frameworks on unequal rows."""
    params = random_params(TWINS)
    model = Split(
        abstract_model(TWINS).graphdef, {path: jnp.asarray(value) for path, value in params.items()}
    )
    ours, state = jaxlm.cached.prefill(model, PROMPTS, 16)
    theirs, torch_state = torchref.cached.prefill(build_torch(TWINS, params), PROMPTS, 16)
    assert relative_error(ours, theirs) < tolerance("f64_decode")
    assert state.positions.tolist() == torch_state.positions.tolist()
    for layer, torch_layer in zip(state.cache.layers, torch_state.cache.layers):
        for row, prompt in enumerate(PROMPTS):
            slots = slice(9 - len(prompt), 9)
            assert relative_error(layer.k[row, :, slots], torch_layer.k[row, :, slots]) < tolerance(
                "f64_decode"
            )
            assert relative_error(layer.v[row, :, slots], torch_layer.v[row, :, slots]) < tolerance(
                "f64_decode"
            )
    assert jax.numpy.all(state.cache.segment == torch_state.cache.segment.numpy())
