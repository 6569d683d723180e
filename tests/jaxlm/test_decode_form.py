"""Decoding as it runs on a GPU: weights laid out by rows, attention of one token, loops that are not asked each round.

All of it computes on any device, and is compared with the plain forms here; how it compiles for an H200 stands in
test_h200_decode.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, V, random_params, relative_error, tiny
from tolerances import tolerance

from jaxlm import generate as decoding
from jaxlm import quant
from jaxlm.attention import fast_attention
from jaxlm.decode_form import RowExperts, RowLinear, for_decoding
from jaxlm.generate import decode, stream
from jaxlm.model import Split, abstract_model, merge_model
from jaxlm.quant import is_quantized, quantize
from jaxlm.sampling import Sampling
from jaxlm.token_attention import token_attention

CASES = {
    "dense, tied, biases": tiny(
        init="fan_in", n_layers=1, tied=True, qkv_bias=True, attn_out_bias=True, mlp_bias=True
    ),
    "experts, shared one": tiny(
        {"expert_bias": True, "shared_d_ff": 24, "shared_gate": True},
        init="fan_in",
        n_layers=2,
        windows=(4, 0),
    ),
    "experts, gelu": tiny({}, init="fan_in", n_layers=1, mlp="gelu_tanh"),
}
PROMPTS = [[5, 3, 9, 1], [7, 2]]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Any:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


def split(config: Any, dtype: Any = np.float32) -> Split:
    """A model with random weights."""
    params = {path: jnp.asarray(value) for path, value in random_params(config, dtype=dtype).items()}
    return Split(abstract_model(config).graphdef, params)


@pytest.mark.parametrize("name", CASES)
def test_a_model_laid_out_by_rows_is_the_same_model(name: str, x64: None) -> None:
    """Logits in float64, every projection and expert turned, nothing else."""
    model = split(CASES[name], np.float64)
    rows = for_decoding(model)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 7)), jnp.int32)
    logits = jax.jit(lambda graphdef, params: merge_model(graphdef, params)(ids)[0], static_argnums=0)
    assert relative_error(logits(*rows), logits(*model)) <= tolerance("f64")
    for path, value in model.params.items():
        assert np.array_equal(rows.params[path], value.mT if is_quantized(path) else value), path
    decoder = merge_model(*rows)
    for block in decoder.blocks:
        assert isinstance(block.attn.q_proj, RowLinear)
        assert block.moe is None or isinstance(block.moe.experts, RowExperts)


def test_quantised_weights_stay_as_they_are() -> None:
    """They lie by rows already."""
    model = quantize(split(CASES["experts, shared one"]), "int8")
    rows = for_decoding(model)
    assert all(rows.params[path] is value for path, value in model.params.items())
    assert merge_model(*rows).blocks[0].attn.q_proj.weight.kind == "int8"


def test_a_quantised_product_of_one_row_is_the_product(x64: None) -> None:
    """The sum that a GPU takes for one row, against the product of any number of rows."""
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.normal(size=(1, 1, 33))), jnp.asarray(rng.normal(size=(21, 33)))
    assert relative_error(quant._one_row(x, weight), quant._rows(x, weight)) <= tolerance("f64")


def test_a_quantised_product_of_one_row_is_summed_in_float32() -> None:
    """Of 4,096 bfloat16 entries, whose running sum in bfloat16 would be wrong in its second digit."""
    x, weight = jnp.ones((1, 4096), jnp.bfloat16), jnp.ones((1, 4096), jnp.bfloat16)
    np.testing.assert_array_equal(quant._one_row(x, weight), [[4096]])


@pytest.mark.parametrize("biased", [False, True])
def test_attention_of_one_token_is_attention(biased: bool, x64: None) -> None:
    """Output and scores in float64 against the general form: rows that see some keys, all keys, and none."""
    B, S, N, K, H = 3, 9, 4, 2, 6
    rng = np.random.default_rng(0)
    q, k, v, bias = (
        jnp.asarray(rng.normal(size=s)) for s in ((B, 1, N, H), (B, S, K, H), (B, S, K, H), (N, 1, S))
    )
    mask = jnp.asarray(np.stack([rng.random((1, S)) < 0.5, np.ones((1, S)), np.zeros((1, S))]).astype(bool))
    bias = bias if biased else None
    wanted, found = fast_attention(q, k, v, mask, bias, 0.0, None), token_attention(q, k, v, mask, bias)
    assert relative_error(found[0], wanted[0]) <= tolerance("f64")
    assert np.array_equal(np.isneginf(found[1]), np.isneginf(wanted[1])) and not np.asarray(found[0][2]).any()
    seen = np.isfinite(np.asarray(wanted[1]))
    assert relative_error(np.asarray(found[1])[seen], np.asarray(wanted[1])[seen]) <= tolerance("f64")


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(21, greedy=True, repetition_penalty=1.3, no_repeat_ngram=2, logprobs=True),
        Sampling(11, temperature=1.0, top_k=20, seed=3, samples=2, stop=(4, 9)),
    ],
)
def test_answers_do_not_depend_on_how_often_the_loop_is_asked(
    settings: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight tokens a round or one, the last round cut or not, stopped in its middle or not: the same answers."""
    model = split(tiny(init="fan_in", n_layers=1, windows=(4,), tied=True))
    wanted = decode(model, PROMPTS, settings)
    monkeypatch.setattr(decoding, "_stride", lambda: decoding.STRIDE)
    assert decode(model, PROMPTS, settings) == wanted
    if settings.greedy:
        assert list(stream(model, PROMPTS[0], settings)) == decode(model, PROMPTS[:1], settings)[0][0].ids


def test_a_context_may_end_in_the_middle_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round makes beyond the cache's last slot is thrown away, and changes nothing before it."""
    config = CASES["dense, tied, biases"]
    model, prompt = split(config), [PROMPTS[0]]
    settings = Sampling(config.context - len(PROMPTS[0]), greedy=True)
    wanted = decode(model, prompt, settings)
    monkeypatch.setattr(decoding, "_stride", lambda: decoding.STRIDE)
    assert decode(model, prompt, settings) == wanted and len(wanted[0][0].ids) % decoding.STRIDE
